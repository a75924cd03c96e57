"""The suite of writers: tests that the test class of every writer inherits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nucleate.checkpoint.disk.folder import CheckpointFolder
from nucleate.checkpoint.disk.single_file import CheckpointFile
from nucleate.checkpoint.disk.target import CheckpointTarget
from nucleate.checkpoint.loader import load
from nucleate.checkpoint.readers import Reader
from nucleate.checkpoint.save_job import SaveJob
from nucleate.checkpoint.saving.snapshot import Snapshot
from nucleate.checkpoint.state.entries import entries_of
from nucleate.checkpoint.writers import Writer
from nucleate.cluster.communicator import Communicator
from nucleate.cluster.environment import Environment
from nucleate.cluster.save_group import SaveGroup
from nucleate.errors import CheckpointError
from nucleate.testing.models import TinyTransformer
from nucleate.testing.reader import ALL_DTYPES, random_bits


class WriterSuite(ABC):
    """The tests of one writer: inherit this class as `Test...`, and implement `make_writer`.

    If the reader of the format is not installed, also implement `make_reader`.

    Attributes:
        dtypes: The dtypes that the format can hold.
        suffix: The ending of a checkpoint's name; empty for folders.
        holds_values: Whether the format stores everything in a state that is not a tensor. If not, its writer has to
            refuse a state with such values; see `Snapshot.other_values`.
    """

    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES
    suffix: str = ""
    holds_values: bool = True

    @abstractmethod
    def make_writer(self) -> Writer:
        """Return a new writer with the options to test."""

    def make_reader(self) -> Reader | None:
        """Return a reader of the format, or None if an installed reader claims the written files."""
        return None

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        """Return the path of a test's checkpoint."""
        return tmp_path / f"checkpoint{self.suffix}"

    def save(self, path: Path, state: dict[str, Any]) -> None:
        """Save a state as `Runtime.save` does."""
        writer = self.make_writer()
        target: CheckpointTarget = CheckpointFile.at(path)
        if not self.suffix:
            target = CheckpointFolder(CheckpointFolder.at(path).path, takes_along=writer.keeps_others)
        snapshot = Snapshot()
        for entry in entries_of(state):
            snapshot.add(entry)
        snapshot.close(0)
        writer.check(snapshot)
        job = SaveJob(snapshot, writer, target, None, SaveGroup(0, 1, None))
        job.prepare(copied=False)
        job.run()

    def load(self, path: Path, state: dict[str, Any]) -> Mapping[str, Any]:
        """Load a state as `Runtime.load` does, and return the remainder of the checkpoint."""
        communicator = Communicator(Environment.detect(), torch.device("cpu"))
        return load(path, state, communicator, reader=self.make_reader(), remainder=True)

    def sample(self) -> dict[str, Tensor]:
        """Return tensors of every dtype with random bits, and of several layouts."""
        tensors = random_bits(self.dtypes)
        first = torch.arange(60, device="cpu").to(self.dtypes[0])
        tensors |= {
            "empty": first[:0].view(0, 3),
            "scalar": first[7],
            "transposed": first.view(6, 10).t(),
            "strided": first[::7],
            "expanded": first[:3].unsqueeze(1).expand(3, 4),
        }
        return tensors

    def vector(self, number: int) -> Tensor:
        """Return a small tensor of a dtype that the format can hold."""
        return torch.full((2,), number, device="cpu").to(self.dtypes[0])

    # --- the contract

    def test_it_has_a_name_and_a_kind(self) -> None:
        writer = self.make_writer()
        assert writer.name
        assert writer.kind == "writer"
        assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in writer.suffixes)
        assert writer.suffixes or writer.writes_folders

    def test_every_tensor_comes_back_bit_for_bit(self, path: Path) -> None:
        tensors = self.sample()
        self.save(path, dict(tensors))
        loaded = {key: torch.zeros_like(tensor).contiguous() for key, tensor in tensors.items()}
        assert self.load(path, loaded) == {}
        for key, tensor in tensors.items():
            assert _bits(loaded[key]) == _bits(tensor), key

    def test_a_training_state_comes_back(self, path: Path) -> None:
        state = _training_state(seed=1)
        if not self.holds_values:
            with pytest.raises(CheckpointError, match="progress"):
                self.save(path, state)
            return
        self.save(path, state)
        other = _training_state(seed=2)
        assert self.load(path, other) == {}
        ours, theirs = state["model"].state_dict(), other["model"].state_dict()
        assert {key: _bits(tensor) for key, tensor in ours.items()} == {key: _bits(t) for key, t in theirs.items()}
        ours, theirs = state["optimizer"].state_dict()["state"], other["optimizer"].state_dict()["state"]
        assert ours.keys() == theirs.keys()
        for number, fields in ours.items():
            assert {name: _bits(value) for name, value in fields.items()} == {
                name: _bits(value) for name, value in theirs[number].items()
            }
        assert other["progress"] == state["progress"]

    def test_what_is_not_asked_for_is_returned(self, path: Path) -> None:
        self.save(path, {"first": self.vector(1), "second": self.vector(0)})
        rest = self.load(path, {"first": self.vector(0)})
        assert list(rest) == ["second"]

    def test_a_checkpoint_without_tensors_is_one(self, path: Path) -> None:
        if not self.holds_values:
            with pytest.raises(CheckpointError, match="step"):
                self.save(path, {"step": 7, "name": "a"})
            return
        self.save(path, {"step": 7, "name": "a"})
        state = {"step": 0, "name": ""}
        self.load(path, state)
        assert state == {"step": 7, "name": "a"}

    def test_a_second_save_takes_the_place_of_the_first(self, path: Path) -> None:
        for number in (1, 2):
            self.save(path, {"both": self.vector(number), f"only in {number}": self.vector(0)})
        state = {"both": self.vector(0)}
        assert list(self.load(path, state)) == ["only in 2"]
        assert _bits(state["both"]) == _bits(self.vector(2))
        assert sorted(item.name for item in path.parent.iterdir() if not item.name.startswith(".")) == [path.name]

    def test_what_it_cannot_hold_is_refused_before_anything_is_written(self, path: Path) -> None:
        self.save(path, {"first": self.vector(1)})
        for dtype in {*ALL_DTYPES} - {*self.dtypes}:
            with pytest.raises(CheckpointError, match="weight"):
                self.save(path, {"weight": torch.zeros(2, dtype=torch.uint8, device="cpu").to(dtype)})
        state = {"first": self.vector(0)}
        self.load(path, state)
        assert _bits(state["first"]) == _bits(self.vector(1))


def _training_state(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model: nn.Module = TinyTransformer()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "progress": {"epoch": seed, "losses": [0.5, seed / 4]}}


def _bits(tensor: Tensor) -> bytes:
    plain = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return bytes(plain.tolist())
