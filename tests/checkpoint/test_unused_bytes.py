"""Bytes of a file that the model does not want are not read, whatever the format."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn

from nucleate import Runtime
from tests.checkpoint.page_cache import cached_pages, drop
from tests.device import ACCELERATOR

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="counts the read bytes in /proc"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized"),
]

#: The tensors that the model does not want: 64 MiB before and behind those that it wants.
UNUSED_BYTES = 64 << 20
#: Headers, indexes, and what the model wants: a hundredth of the file.
LIMIT_BYTES = UNUSED_BYTES // 64


def write_dcp(tensors: dict[str, Tensor], path: Path) -> None:
    dcp.save(tensors, checkpoint_id=path)


def write_indexed(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a folder of Hugging Face's kind, in which a file holds wanted and unused tensors."""
    path.mkdir()
    save_file(tensors, path / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


FORMATS: dict[str, tuple[str, Callable[[dict[str, Tensor], Any], object]]] = {
    "safetensors": ("w.safetensors", save_file),
    "safetensors folder": ("folder", write_indexed),
    "torch": ("w.pt", torch.save),
    "dcp": ("dcp", write_dcp),
}


@pytest.fixture(params=FORMATS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Weights between large tensors of other models, one of which is called as the wanted layer begins."""
    name, write = FORMATS[request.param]
    half = UNUSED_BYTES // 8
    other = {"aaa.weight": torch.ones(half), "layer.weight_ema": torch.ones(half)}
    write({**other, "layer.weight": torch.full((8, 8), 3.0), "layer.bias": torch.full((8,), 4.0)}, tmp_path / name)
    return tmp_path / name


def files(path: Path) -> list[Path]:
    return [file for file in ([path] if path.is_file() else sorted(path.iterdir())) if file.stat().st_size]


def bytes_read() -> int:
    """Return how many bytes this process has asked the system for."""
    return int(Path("/proc/self/io").read_text().split()[1])


def load(path: Path, is_deferred: bool, **options: Any) -> nn.Module:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device")
    with runtime.init_module(empty_init=is_deferred):
        model = nn.ModuleDict({"layer": nn.Linear(8, 8)})
    report = runtime.load_raw(path, model, strict=False, **options)
    assert len(report.unexpected) == 2
    model = runtime.setup(model)
    assert bool((model["layer"].weight == 3).all())
    assert bool((model["layer"].bias == 4).all())
    return model


@pytest.mark.parametrize("is_deferred", [True, False], ids=["deferred", "real"])
def test_a_load_asks_the_system_for_the_wanted_bytes_only(path: Path, is_deferred: bool) -> None:
    load(path, is_deferred)  # What is imported now is not read below.
    before = bytes_read()
    load(path, is_deferred)
    assert bytes_read() - before < LIMIT_BYTES


def test_a_load_brings_no_unused_bytes_into_the_page_cache(path: Path) -> None:
    """What the system is asked to read ahead is in no count of the process."""
    for file in files(path):
        drop(file)
    load(path, is_deferred=True)
    # The system itself reads some pages ahead at each place.
    assert 4096 * sum(map(cached_pages, files(path))) < UNUSED_BYTES // 16


def test_a_prefix_leaves_the_bytes_outside_of_it(tmp_path: Path) -> None:
    weights = {"model.layer.weight": torch.ones(8, 8), "model.layer.bias": torch.ones(8)}
    moments = {"state": {n: {"exp_avg": torch.zeros(UNUSED_BYTES // 8)} for n in range(2)}}
    torch.save({"state_dict": weights, "optimizer": moments}, tmp_path / "training.pt")
    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device")

    def load_part() -> None:
        model = nn.ModuleDict({"layer": nn.Linear(8, 8)})
        runtime.load_raw(tmp_path / "training.pt", model, prefix="state_dict.model.")
        assert bool((model["layer"].weight == 1).all())

    load_part()
    before = bytes_read()
    load_part()
    assert bytes_read() - before < LIMIT_BYTES
