"""The choice of a writer: by `format=`, by the ending of a path, and among the writers of other packages."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from nucleate import Runtime
from nucleate.checkpoint.saving.snapshot import Snapshot
from nucleate.checkpoint.writers import Writer, choosing
from nucleate.checkpoint.writers.choosing import choose, format_of
from nucleate.cluster.save_group import SaveGroup
from nucleate.errors import CheckpointError, ConfigurationError
from nucleate.registry import WRITERS


class ListingWriter(Writer):
    """Writes the names of tensors into a text file."""

    suffixes: ClassVar[tuple[str, ...]] = (".names",)
    writes_folders: ClassVar[bool] = False

    def write(self, snapshot: Snapshot, draft: Path, group: SaveGroup) -> None:
        if group.rank == 0:
            draft.write_text("\n".join(held.key for held in snapshot.tensors))


class NamesWriter(Writer):
    """Writes the names of tensors into a folder, one file for each."""

    def write(self, snapshot: Snapshot, draft: Path, group: SaveGroup) -> None:
        if group.rank == 0:
            for held in snapshot.tensors:
                (draft / f"{held.key}.txt").write_text(held.key)


class GreedyWriter(ListingWriter):
    """Wants the endings of others."""

    suffixes: ClassVar[tuple[str, ...]] = (".pt", ".safetensors")

    def __init__(self) -> None:
        raise RuntimeError("never made by accident")


@pytest.fixture
def installed() -> Iterator[dict[str, list[EntryPoint]]]:
    """The table of installed writers, to add to."""
    WRITERS.__dict__.pop("_installed", None)
    table = WRITERS._installed
    table["names"] = [EntryPoint("names", f"{__name__}:ListingWriter", WRITERS.group)]
    table["folders"] = [EntryPoint("folders", f"{__name__}:NamesWriter", WRITERS.group)]
    table["a-greedy"] = [EntryPoint("a-greedy", f"{__name__}:GreedyWriter", WRITERS.group)]
    yield table
    WRITERS.__dict__.pop("_installed")


@pytest.mark.parametrize("format", [None, "names"])
def test_a_writer_of_somebody_else_is_found(installed: object, tmp_path: Path, format: str | None) -> None:
    Runtime(accelerator="cpu").save(tmp_path / "model.names", torch.nn.Linear(2, 2), format=format)
    assert (tmp_path / "model.names").read_text().split() == ["weight", "bias"]


def test_a_folder_of_somebody_elses_format_is_a_checkpoint(installed: object, tmp_path: Path) -> None:
    runtime = Runtime(accelerator="cpu")
    for step in range(3):
        state = {"layer": torch.nn.Linear(2, 2, bias=step != 1)}
        runtime.save(tmp_path / f"step{step}", state, format="folders", keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["step1", "step2"]
    # It may be replaced, and what is not in it any more is gone.
    runtime.save(tmp_path / "step2", {"other": torch.nn.Linear(2, 2)}, format="folders")
    names = {path.name for path in (tmp_path / "step2").iterdir()}
    assert names == {"nucleate.json", "other.weight.txt", "other.bias.txt"}
    (tmp_path / "step2" / "notes.md").write_text("mine")
    with pytest.raises(CheckpointError, match=r"somebody put notes\.md into it"):
        runtime.save(tmp_path / "step2", state, format="folders")


@pytest.mark.parametrize(("name", "format"), [("model.pt", "torch"), ("model.safetensors", "safetensors")])
def test_the_endings_of_built_in_formats_stay_theirs(installed: object, tmp_path: Path, name: str, format: str) -> None:
    assert format_of(str(tmp_path / name)) == format


def test_the_endings_that_are_known_without_an_import_are_those_of_the_writers() -> None:
    assert {name: WRITERS.get(name).suffixes for name in WRITERS.builtins} == {"dcp": (), **choosing._SUFFIXES}


def test_its_format_is_one_file(installed: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"format='names' is one file, .* endings \.names"):
        choose(str(tmp_path / "model"), "names", "5GB")


def test_a_broken_writer_disturbs_nobody_else(installed: dict[str, list[EntryPoint]], tmp_path: Path) -> None:
    installed["broken"] = [EntryPoint("broken", "nowhere:Writer", WRITERS.group)]
    assert format_of(str(tmp_path / "model.v2")) is None
    assert choose(str(tmp_path / "model.v2"), None, "5GB")[0].name == "dcp"


def test_an_unknown_format_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(ConfigurationError, match="'dcp', 'safetensors', 'torch'"):
        choose("model", "onnx", "5GB")
