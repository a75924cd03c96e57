"""`convert`: any format into any other, bit for bit, whole or absent, in constant memory."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nucleate import Runtime
from nucleate.checkpoint import Selection, convert, open_checkpoint, verify
from nucleate.checkpoint.save_job import SaveJob
from nucleate.checkpoint.saving.rank_share import Box, SavedTensor
from nucleate.checkpoint.saving.snapshot import Snapshot
from nucleate.checkpoint.state.values import encode
from nucleate.checkpoint.writers import allocation
from nucleate.checkpoint.writers.choosing import choose
from nucleate.cluster.save_group import SaveGroup
from nucleate.errors import CheckpointError, CheckpointKeyError, CheckpointNotFoundError, ConfigurationError
from tests.device import ACCELERATOR, equal

pytestmark = pytest.mark.usefixtures("factories_on_device")

TARGETS = {"dcp": "folder", "safetensors": "folder", "one safetensors file": "a.safetensors", "torch": "a.pt"}


def format_of(name: str) -> str | None:
    return name if TARGETS[name] == "folder" else None


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(tokens)))


def start() -> tuple[Runtime, Any, Any]:
    runtime = Runtime(accelerator=ACCELERATOR)
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return runtime, *runtime.setup(model, optimizer)


def step(runtime: Runtime, model: Any, optimizer: Any) -> float:
    optimizer.zero_grad()
    loss = model(torch.arange(16)).square().mean()
    runtime.backward(loss)
    optimizer.step()
    return float(loss.detach())


@pytest.fixture
def training(tmp_path: Path) -> Path:
    runtime, model, optimizer = start()
    step(runtime, model, optimizer)
    state = {
        "model": model,
        "optimizer": optimizer,
        "step": 1,
        "config": {"lr": 0.1, "nan": float("nan"), "names": ["a", None]},
        "order": torch.arange(5),
    }
    runtime.save(tmp_path / "training", state)
    return tmp_path / "training"


@pytest.mark.parametrize("last", TARGETS)
@pytest.mark.parametrize("first", TARGETS)
def test_a_training_state_goes_through_two_formats_and_training_goes_on_with_the_same_bits(
    tmp_path: Path, training: Path, first: str, last: str
) -> None:
    convert(training, tmp_path / "1" / TARGETS[first], format=format_of(first))
    report = convert(tmp_path / "1" / TARGETS[first], tmp_path / "2" / TARGETS[last], format=format_of(last))
    assert (report.num_tied, report.num_cast) == (1, 0)
    assert verify(tmp_path / "2" / TARGETS[last], against=training).is_good
    runtime, model, optimizer = start()
    step(runtime, model, optimizer)
    expected = [step(runtime, model, optimizer) for _ in range(3)]
    runtime, model, optimizer = start()
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0, "config": None}
    state["order"] = torch.zeros(5, dtype=torch.int64)
    runtime.load(tmp_path / "2" / TARGETS[last], state)
    assert state["step"] == 1
    assert state["config"]["names"] == ["a", None]
    assert state["order"].tolist() == [0, 1, 2, 3, 4]
    assert model.head.weight is model.embed.weight
    assert [step(runtime, model, optimizer) for _ in range(3)] == expected


def every_dtype() -> dict[str, torch.Tensor]:
    numbers = torch.tensor([[0.0, -0.0, 1.5], [float("nan"), float("inf"), -3.25]])
    tensors = {
        str(dtype).removeprefix("torch."): numbers.to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    }
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        tensors[str(dtype).removeprefix("torch.")] = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
    tensors["scalar"] = torch.tensor(7.5)
    tensors["empty"] = torch.empty(0, 3)
    tensors["another.empty"] = torch.empty(0, 3)
    return tensors


@pytest.mark.parametrize("target", TARGETS)
def test_every_dtype_scalars_and_empty_tensors_keep_their_bits(tmp_path: Path, target: str) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "source.safetensors")
    convert(tmp_path / "source.safetensors", tmp_path / TARGETS[target], format=format_of(target))
    report = verify(tmp_path / TARGETS[target], against=tmp_path / "source.safetensors")
    assert report.is_good
    contents = open_checkpoint(tmp_path / TARGETS[target])
    assert {key: (one.dtype, one.shape) for key, one in contents.tensors.items()} == {
        key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()
    }


def test_what_is_written_is_read_by_the_libraries_of_others(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(64, 32), "b": torch.randn(7).bfloat16()}
    save_file(tensors, tmp_path / "source.safetensors")
    convert(tmp_path / "source.safetensors", tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "folder", format="safetensors", max_shard_size=100)
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    shards = {}
    for path in (tmp_path / "folder").glob("model-*-of-00002.safetensors"):
        shards.update(load_file(path))
    for found in (loaded, shards):
        assert found.keys() == tensors.keys()
        assert all(equal(found[key], tensors[key]) for key in tensors)


def in_parts(path: Path) -> torch.Tensor:
    """Save a tensor as four ranks would."""
    whole = torch.arange(24.0).view(4, 6)
    boxes = tuple(
        Box((row, column), whole[row : row + 2, column : column + 3].contiguous())
        for row in (0, 2)
        for column in (0, 3)
    )
    snapshot = Snapshot()
    snapshot.skeleton, snapshot.keys, snapshot.modules = (
        {"model": {"w": None}},
        {("model", "w"): "model.w"},
        [("model",)],
    )
    snapshot.tensors = [SavedTensor("model.w", whole.dtype, (4, 6), (0, 1), boxes)]
    values = {
        "skeleton": snapshot.skeleton,
        "keys": snapshot.keys,
        "sharded": snapshot.sharded,
        "modules": [("model",)],
    }
    snapshot.values = encode(values)
    job = SaveJob(snapshot, *choose(str(path), "dcp", "5GB"), None, SaveGroup(0, 1, None))
    job.prepare(copied=False)
    job.run()
    return whole


@pytest.mark.parametrize("target", TARGETS)
def test_parts_of_several_ranks_become_one_tensor(tmp_path: Path, target: str) -> None:
    whole = in_parts(tmp_path / "source")
    assert len(open_checkpoint(tmp_path / "source").tensors["model.w"].chunks) == 4
    convert(tmp_path / "source", tmp_path / "out" / TARGETS[target], format=format_of(target))
    contents = open_checkpoint(tmp_path / "out" / TARGETS[target])
    stored = contents.tensors["model.w"]
    assert len(stored.chunks) == 1
    out = torch.empty(24)
    stored.read(0, out)
    assert torch.equal(out, whole.view(-1))
    assert contents.sharded == {"model.w": [0, 1]}


@pytest.mark.parametrize("target", TARGETS)
def test_transposed_and_expanded_tensors_of_a_torch_file_are_written_row_by_row(tmp_path: Path, target: str) -> None:
    tensors = {"t": torch.randn(5, 3).t(), "e": torch.randn(3, 1).expand(3, 4), "s": torch.randn(9)[::2]}
    torch.save(tensors, tmp_path / "source.pth")
    convert(tmp_path / "source.pth", tmp_path / TARGETS[target], format=format_of(target))
    loaded = Runtime(accelerator=ACCELERATOR).load(tmp_path / TARGETS[target])
    for key, tensor in tensors.items():
        assert equal(loaded[key], tensor)


def test_tensors_that_share_bytes_under_two_names_are_written_once(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    torch.save({"embed": weight, "head": weight}, tmp_path / "source.pt")
    report = convert(tmp_path / "source.pt", tmp_path / "a.safetensors")
    assert (report.num_tensors, report.num_tied) == (1, 1)
    assert list(load_file(tmp_path / "a.safetensors")) == ["embed"]
    convert(tmp_path / "a.safetensors", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back["head"].data_ptr() == back["embed"].data_ptr()


def lightning(path: Path) -> dict[str, Any]:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    saved = {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "epoch": 3}
    torch.save(saved, path)
    return saved


@pytest.mark.parametrize("target", TARGETS)
def test_the_nested_checkpoint_of_another_framework_comes_back_as_it_was(tmp_path: Path, target: str) -> None:
    saved = lightning(tmp_path / "source.ckpt")
    convert(tmp_path / "source.ckpt", tmp_path / "out" / TARGETS[target], format=format_of(target))
    # Its optimizer still goes by numbers, and that must be known.
    assert not open_checkpoint(tmp_path / "out" / TARGETS[target]).is_complete
    convert(tmp_path / "out" / TARGETS[target], tmp_path / "back.ckpt")
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)
    torch.testing.assert_close(back, saved, rtol=0, atol=0, check_device=False)
    assert back["optimizer_states"][0]["param_groups"] == saved["optimizer_states"][0]["param_groups"]


def test_one_entry_becomes_a_model_of_its_own(tmp_path: Path, training: Path) -> None:
    convert(training, tmp_path / "a.safetensors", selection=Selection(only="model"))
    weights = load_file(tmp_path / "a.safetensors")
    assert "embed.weight" in weights
    assert "head.weight" not in weights  # tied
    fresh = Tied()
    Runtime(accelerator=ACCELERATOR).load_raw(tmp_path / "a.safetensors", fresh)
    assert equal(fresh.head.weight, weights["embed.weight"])
    assert open_checkpoint(tmp_path / "a.safetensors").modules == ((),)


def test_keys_are_renamed_behind_a_prefix(tmp_path: Path, training: Path) -> None:
    selection = Selection(prefix="model.", keys=[{r"^embed\.": "tokens."}, {"weight$": "w"}])
    convert(training, tmp_path / "a.pt", selection=selection)
    assert list(torch.load(tmp_path / "a.pt", weights_only=True)) == [
        "tokens.w",
        "norm.w",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
        "head.w",
    ]


@pytest.mark.parametrize(
    ("selection", "error", "says"),
    [
        (Selection(only="modell"), CheckpointKeyError, "nothing at modell. It has model, optimizer, step, config, 1 t"),
        (Selection(only="step"), CheckpointKeyError, "no entry with tensors at step"),
        (Selection(only="config"), CheckpointKeyError, "config in .* has no tensors"),
        (Selection(prefix="m."), CheckpointKeyError, "no key .* begins with 'm.'"),
        (Selection(keys={"a": "b"}), ConfigurationError, "Choose one entry by `only`"),
        (Selection(only="model", keys={".*weight": "w"}), CheckpointKeyError, "both become w"),
        (Selection(only="model", keys={"(": "w"}), ConfigurationError, "not a regular expression"),
        (Selection(only="model", keys=lambda key: None), CheckpointKeyError, "no key"),
        (
            Selection(only="model", keys=lambda key: "" if key == "norm.weight" else key),
            CheckpointKeyError,
            "becomes empty",
        ),
    ],
)
def test_a_selection_that_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, training: Path, selection: Selection, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        convert(training, tmp_path / "out", selection=selection)
    assert os.listdir(tmp_path) == ["training"]


def test_a_cast_takes_the_models_floating_point_tensors_and_no_others(tmp_path: Path, training: Path) -> None:
    report = convert(training, tmp_path / "out", format="safetensors", dtype=torch.bfloat16)
    contents = open_checkpoint(tmp_path / "out")
    cast = {key for key, stored in contents.tensors.items() if stored.dtype is torch.bfloat16}
    assert cast == {f"model.{key}" for key in ("embed.weight", "norm.weight", "norm.bias", *RUNNING)}
    assert report.num_cast == len(cast)
    loaded, saved = (
        Runtime(accelerator=ACCELERATOR).load(tmp_path / "out"),
        Runtime(accelerator=ACCELERATOR).load(training),
    )
    assert torch.equal(loaded["model"]["embed.weight"], saved["model"]["embed.weight"].bfloat16())
    with pytest.raises(ConfigurationError, match="torch.int8 is not a dtype that models can be cast to"):
        convert(training, tmp_path / "other", dtype=torch.int8)


RUNNING = ("norm.running_mean", "norm.running_var")


def test_a_cast_of_what_may_be_no_model_is_refused(tmp_path: Path) -> None:
    torch.save({"net": {"w": torch.ones(2)}, "opt": {"step": torch.ones(())}}, tmp_path / "a.pt")
    with pytest.raises(ConfigurationError, match="does not say which entries are models.*It has net, opt"):
        convert(tmp_path / "a.pt", tmp_path / "out", dtype=torch.bfloat16)
    convert(tmp_path / "a.pt", tmp_path / "out", dtype=torch.bfloat16, selection=Selection(only="net"))
    assert open_checkpoint(tmp_path / "out").tensors["w"].dtype is torch.bfloat16


def test_what_is_at_the_target_is_replaced_only_if_it_is_a_checkpoint_and_that_was_asked_for(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "out", format="dcp")
    with pytest.raises(ConfigurationError, match="exists already"):
        convert(tmp_path / "a.safetensors", tmp_path / "out", format="dcp")
    convert(tmp_path / "a.safetensors", tmp_path / "out", format="dcp", overwrite=True)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ConfigurationError, match="notes is not a checkpoint, and only checkpoints are replaced"):
        convert(tmp_path / "a.safetensors", tmp_path / "notes", overwrite=True)
    assert (tmp_path / "notes").read_text() == "mine"
    inner = tmp_path / "out" / "b.safetensors"
    save_file({"a": torch.ones(2)}, inner)
    with pytest.raises(ConfigurationError, match="lies in"):
        convert(inner, tmp_path / "out", overwrite=True)


def test_a_checkpoint_is_replaced_by_its_own_conversion(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    here = tmp_path / "a.safetensors"
    convert(here, here, dtype=torch.float16, overwrite=True)
    assert load_file(here)["a"].dtype is torch.float16


def test_a_folder_is_written_in_the_format_that_it_comes_from(tmp_path: Path) -> None:
    in_parts(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "copy").format == "dcp"
    assert convert(tmp_path / "copy", tmp_path / "a.pt").format == "torch"
    assert convert(tmp_path / "a.pt", tmp_path / "llama-3.1").format == "safetensors"


def test_a_source_that_is_not_there_or_damaged_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        convert(tmp_path / "nowhere", tmp_path / "out")
    save_file({"a": torch.ones(1000)}, tmp_path / "a.safetensors")
    os.truncate(tmp_path / "a.safetensors", 2000)
    with pytest.raises(CheckpointError, match="a.safetensors"):
        convert(tmp_path / "a.safetensors", tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_source_that_is_cut_short_meanwhile_is_an_error_and_leaves_nothing(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.ones(1000), "b": torch.ones(1000)}, tmp_path / "a.safetensors")
    prepare = SaveJob.prepare

    def cut(job: SaveJob, copied: bool) -> None:
        prepare(job, copied)
        os.truncate(tmp_path / "a.safetensors", 5000)

    monkeypatch.setattr(SaveJob, "prepare", cut)
    with pytest.raises(CheckpointError, match="was cut short after it was opened"):
        convert(tmp_path / "a.safetensors", tmp_path / "out" / TARGETS[target], format=format_of(target))
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("target", TARGETS)
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / "a.safetensors")

    def full(descriptor: int, size_bytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(allocation, "reserve", full)
    monkeypatch.setattr(allocation, "free_bytes", lambda folder: 7)
    with pytest.raises(CheckpointError, match="7 bytes are free"):
        convert(tmp_path / "a.safetensors", tmp_path / "out" / TARGETS[target], format=format_of(target))
    assert os.listdir(tmp_path / "out") == []


MEMORY = """
import sys, threading, time
import torch
from nucleate.checkpoint import convert
from nucleate.report import anonymous_bytes
import nucleate.checkpoint.writers.dcp, nucleate.checkpoint.writers.torch_file, torch._subclasses.fake_tensor

# What it imports when it is first used is no tensor.
convert(sys.argv[1], sys.argv[2] + ".first" + sys.argv[3], format=sys.argv[4] or None, dtype=torch.bfloat16)
peak, base, done = 0, anonymous_bytes(), False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
convert(sys.argv[1], sys.argv[2] + sys.argv[3], format=sys.argv[4] or None, dtype=torch.bfloat16)
done = True
thread.join()
print((peak - base) // 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
@pytest.mark.parametrize("target", ["dcp", "one safetensors file", "torch"])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path, target: str) -> None:
    """400 MiB in tensors of 10 MiB: two buffers for each thread, and the check sum's."""
    save_file({str(number): torch.zeros(10 << 18) for number in range(40)}, tmp_path / "source.safetensors")
    suffix = Path(TARGETS[target]).suffix
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            MEMORY,
            tmp_path / "source.safetensors",
            tmp_path / "out",
            suffix,
            format_of(target) or "",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(done.stdout) < 64
