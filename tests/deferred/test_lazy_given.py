"""The elements of tensors that Lightning Fabric's `_lazy_load` has not read yet."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric.utilities.load import _lazy_load
from torch import Tensor, nn

from nucleate.deferred import ElementSource
from nucleate.deferred.elements import lazy_tensor
from nucleate.deferred.elements.lazy_tensor import given_of_lazy, memory_of_lazy
from nucleate.errors import CheckpointError

TENSORS = {
    "plain": torch.arange(12.0).reshape(3, 4),
    "half": torch.arange(5).to(torch.bfloat16),
    "part": torch.arange(20)[6:14].reshape(2, 4),
    "turned": torch.arange(12.0).reshape(3, 4).t(),
    "scalar": torch.tensor(7),
    "parameter": nn.Parameter(torch.ones(2, 2)),
    "conjugate": torch.tensor([1 + 2j, 3 - 1j]).conj(),
    "empty": torch.empty(0, 3),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save(TENSORS, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def read(given: ElementSource | None, start: int = 0, stop: int | None = None) -> Tensor:
    assert given is not None
    numel = torch.Size(given.shape).numel() if stop is None else stop - start
    out = torch.empty(numel, dtype=given.dtype)
    given.read(start, out)
    return out


@pytest.mark.parametrize("by_file", [True, False])
def test_all_elements_and_ranges_of_them_are_read(path: Path, by_file: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not by_file:
        monkeypatch.setattr(lazy_tensor, "_find", lambda reader: None)
    lazy = _lazy_load(path)
    for name, tensor in TENSORS.items():
        given = given_of_lazy(lazy[name])
        assert given is not None
        assert (given.dtype, given.shape) == (tensor.dtype, tuple(tensor.shape))
        if tensor.numel():
            assert torch.equal(read(given).view(tensor.shape), tensor)
        if tensor.numel() > 3:
            assert torch.equal(read(given, 1, 3), tensor.flatten()[1:3])
            assert torch.equal(read(given, 0, 2), tensor.flatten()[:2])


def test_the_memory_of_a_transposed_tensor_is_read_as_it_lies(path: Path) -> None:
    given = memory_of_lazy(_lazy_load(path)["turned"])
    assert given is not None
    assert given.shape == (12,)
    assert torch.equal(read(given), torch.arange(12.0))


def test_only_the_wanted_range_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = _lazy_load(path)
    monkeypatch.setattr(type(lazy["plain"]), "_load_tensor", lambda self: pytest.fail("it was read by its library"))
    given = given_of_lazy(lazy["plain"])
    del lazy
    gc.collect()
    # The library's reader is closed by now.
    assert torch.equal(read(given, 5, 7), torch.tensor([5.0, 6.0]))


def test_ranks_agree_on_what_it_is_wherever_they_find_the_file(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "model.pt"
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())
    descriptions = []
    for each, name in ((path, "plain"), (other, "plain"), (path, "part")):
        given = given_of_lazy(_lazy_load(each)[name])
        assert given is not None
        descriptions.append(given.describe())
        del given
    assert descriptions[0] == descriptions[1] != descriptions[2]


def test_each_of_two_files_with_equal_tensors_is_its_own(tmp_path: Path) -> None:
    for number in (1, 2):
        torch.save({"w": torch.full((3,), float(number))}, tmp_path / f"{number}.pt")
    lazy = [_lazy_load(tmp_path / f"{number}.pt") for number in (1, 2)]
    assert [read(given_of_lazy(each["w"])).tolist() for each in lazy] == [[1.0] * 3, [2.0] * 3]


def test_of_two_equal_files_that_are_open_neither_is_taken_for_the_other(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "copy.pt"
    other.write_bytes(path.read_bytes())
    lazy = [_lazy_load(each) for each in (path, other)]
    given = given_of_lazy(lazy[0]["plain"])
    assert memory_of_lazy(lazy[0]["plain"]) is None
    assert torch.equal(read(given), torch.arange(12.0))


def test_a_file_that_is_written_afterwards_is_an_error_that_names_it(path: Path) -> None:
    given: Any = given_of_lazy(_lazy_load(path)["plain"])
    given.check_unchanged()
    time.sleep(0.02)  # The system's clock for files goes in steps.
    with path.open("r+b") as file:
        file.write(b"PK")
    with pytest.raises(CheckpointError, match="model.pt was written to"):
        given.check_unchanged()
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="model.pt was cut short"):
        read(given)


def test_anything_else_is_not_lazy() -> None:
    class Half:
        metatensor = torch.empty(1)

    assert [given_of_lazy(value) for value in (torch.ones(2), None, "plain", Half(), object())] == [None] * 5
    assert memory_of_lazy(torch.ones(2)) is None
