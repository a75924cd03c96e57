"""litgpt's own programs run on nucleate, unedited: pretraining, finetuning and generation with a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

JOB = Path(__file__).with_name("litgpt_job.py")
#: Compiling the tiny model takes a minute in each process.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}


def run(*arguments: object, **variables: str) -> str:
    """Run a script, or `-m litgpt`, by the stand-in, and return everything that it prints."""
    command = [sys.executable, "-m", "nucleate.compat.fabric", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**ENVIRONMENT, **variables}, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def finetune(way: str, folder: Path, devices: int) -> Path:
    """Run a finetuning command of litgpt, and return the folder that it writes."""
    options = {
        "out_dir": folder / way,
        "precision": "32-true",
        "devices": devices,
        "data": "JSON",
        "data.json_path": folder / "tokenizer/pairs.json",
        "data.val_split_fraction": 0.1,
        "data.num_workers": 0,
        "train.max_steps": 6,
        "train.epochs": 2,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 2,
        "train.lr_warmup_steps": 1,
        "train.max_seq_length": 32,
        "eval.interval": 100,
        "eval.max_iters": 2,
        "eval.max_new_tokens": 4,
    }
    pairs = (part for name, value in options.items() for part in (f"--{name}", value))
    run("-m", "litgpt", way, folder / "base", *pairs)
    return folder / way / "final"


def weights(path: Path) -> dict[str, torch.Tensor]:
    state = torch.load(path)
    return state.get("model", state)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def pretrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder with a pretrained model, and the number of ranks that trained it."""
    folder = tmp_path_factory.mktemp("litgpt")
    assert "Final evaluation" in run(JOB, folder, "--devices", request.param)
    run("-m", "litgpt", "convert_pretrained_checkpoint", folder / "pretrained/final", folder / "base")
    return folder, request.param


def test_a_model_pretrains_on_one_rank_and_under_fsdp(pretrained: tuple[Path, int]) -> None:
    folder, _ = pretrained
    logged = next((folder / "pretrained/logs").rglob("metrics.csv")).read_text().splitlines()
    column = logged[0].split(",").index("loss")
    losses = [float(line.split(",")[column]) for line in logged[1:] if line.split(",")[column]]
    assert losses[-1] < 0.7 * losses[0]


def test_the_weights_begin_as_litgpt_initializes_them(pretrained: tuple[Path, int]) -> None:
    # litgpt gives each layer a `reset_parameters` of its own, and counts on Fabric to call it under FSDP.
    folder, _ = pretrained
    first = weights(next((folder / "pretrained").glob("step-00000005")) / "lit_model.pth")
    assert first["transformer.wte.weight"].std() < 0.3


def test_pretraining_goes_on_from_a_checkpoint(pretrained: tuple[Path, int]) -> None:
    folder, devices = pretrained
    assert "Resuming training from" in run(JOB, folder, "--devices", devices, "--resume")


@pytest.mark.parametrize("way", ["finetune_full", "finetune_lora"])
def test_a_model_is_finetuned(way: str, pretrained: tuple[Path, int]) -> None:
    folder, devices = pretrained
    before, after = weights(folder / "base/lit_model.pth"), weights(finetune(way, folder, devices) / "lit_model.pth")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_a_model_generates_text(pretrained: tuple[Path, int]) -> None:
    folder, _ = pretrained
    options = ("--prompt", "3 and 4", "--max_new_tokens", 8, "--precision", "32-true")
    assert "3 and 4" in run("-m", "litgpt", "generate", folder / "base", *options)


def test_a_compiled_model_pretrains(tmp_path: Path) -> None:
    assert "Final evaluation" in run(JOB, tmp_path, TORCHDYNAMO_DISABLE="0")
