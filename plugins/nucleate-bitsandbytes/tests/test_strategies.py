"""Quantized models on several ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nucleate import Runtime

sys.path.insert(0, str(Path(__file__).parent))

from quantized_model import Model, history
from started_ranks import output_of_ranks

MODES = ["nf4", "nf4-dq", "fp4", "int8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the model, by mode."""
    folder = tmp_path_factory.mktemp("one")
    torch.manual_seed(9)
    full = {name: tensor.detach() for name, tensor in Model().state_dict().items()}
    save_file(full, folder / "full.safetensors")
    for mode in MODES:
        runtime = Runtime(accelerator="cpu", precision=f"bnb-{mode}")
        made = {"size_bytes": sum(tensor.nbytes for tensor in full.values())}
        torch.manual_seed(3)
        with runtime.init_module(empty_init=True):
            model = Model()
        made["from recipe"] = {name: t.clone() for name, t in runtime.setup(model).state_dict().items()}
        with runtime.init_module(empty_init=True):
            model = Model()
        runtime.load_raw(folder / "full.safetensors", model)
        model = runtime.setup(model)
        made["from file"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        made["history"] = history(runtime, model)
        made["trained"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        torch.save(made, folder / f"{mode}.pt")
    return folder


@pytest.mark.parametrize(
    ("strategy", "num_ranks", "modes"),
    [("fsdp", 2, MODES), ("fsdp, gathered until backward", 2, ["nf4", "int8"]), ("ddp", 2, ["nf4-dq", "int8"])],
)
def test_the_ranks_have_and_do_what_one_process_does(
    folder: Path, strategy: str, num_ranks: int, modes: list[str]
) -> None:
    output = output_of_ranks("strategies.py", num_ranks, strategy, str(folder), *modes)
    for mode in modes:
        assert output.count(f": {mode} exact") == num_ranks
