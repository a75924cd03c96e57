"""Weights that are joined, transposed and permuted are quantized while they are read, as if they lay so in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.checkpoint import concatenate, permute_heads, transpose
from nucleate.checkpoint.stored import data_file

RULES = [
    concatenate(["q", "k", "v"], "qkv.weight", sizes=[2, 1, 1], groups=4),
    transpose("up.weight"),
    permute_heads("down.weight", num_heads=4),
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(512, 512, bias=False)
        self.up = nn.Linear(512, 1024, bias=False)
        self.down = nn.Linear(1024, 512, bias=False)


def stored() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "q": torch.randn(256, 512),
        "k": torch.randn(128, 512),
        "v": torch.randn(128, 512),
        "up.weight": torch.randn(512, 1024),
        "down.weight": torch.randn(512, 1024),
    }


@pytest.mark.parametrize("is_set_up", [False, True])
@pytest.mark.parametrize("mode", ["int8", "nf4", "nf4-dq"])
def test_codes_are_those_of_the_weights_in_the_models_layout(
    tmp_path: Path, mode: str, is_set_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(stored(), tmp_path / "others.safetensors")
    plain = Model()
    runtime = Runtime(accelerator="cpu")
    runtime.load_raw(tmp_path / "others.safetensors", plain, keys=RULES)
    runtime.save(tmp_path / "ours.safetensors", plain)

    read: list[int] = []
    real = data_file.DataFile.read_into

    def read_into(self: Any, address: int, size_bytes: int, offset: int) -> None:
        read.append(size_bytes)
        real(self, address, size_bytes, offset)

    monkeypatch.setattr(data_file.DataFile, "read_into", read_into)
    found = []
    for name, keys in (("ours", None), ("others", RULES)):
        runtime = Runtime(accelerator="cpu", precision=f"bnb-{mode}")
        with runtime.init_module(empty_init=True):
            model = Model()
        if is_set_up:
            found.append(runtime.setup(model).module)
        read.clear()
        assert runtime.load_raw(tmp_path / f"{name}.safetensors", model, keys=keys).is_exact
        if not is_set_up:
            assert not read
            found.append(runtime.setup(model).module)
    one, other = (model.state_dict() for model in found)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    if not is_set_up:
        # Rows are long, so nothing is read twice, not even by the transposition.
        assert sum(read) <= 1.1 * sum(tensor.numel() * 4 for tensor in stored().values())
