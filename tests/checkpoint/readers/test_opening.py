"""What is at a path decides who reads it; where nobody can, the message says what is there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import safetensors.torch
import torch

from nucleate.checkpoint.readers import Reader, open_checkpoint, reader_for
from nucleate.checkpoint.stored.contents import Contents
from nucleate.errors import CheckpointError, CheckpointNotFoundError, ConfigurationError, PluginNotFoundError
from nucleate.registry import READERS
from tests.checkpoint.readers.reading import as_nobody, entry, write_raw


@pytest.fixture
def file(tmp_path: Path) -> Path:
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


class TextReader(Reader):
    """Claims `.text` files."""

    name = "text"

    def claims(self, path: Path) -> bool:
        return path.suffix in (".text", ".safetensors")

    def read(self, path: Path) -> Contents:
        return Contents.flat(path, self.name, {})


class BrokenReader(TextReader):
    """Fails when it is asked."""

    def claims(self, path: Path) -> bool:
        raise ZeroDivisionError("broken")


@pytest.fixture
def installed() -> Iterator[dict[str, list[EntryPoint]]]:
    """The table of installed readers, to add to."""
    READERS.__dict__.pop("_installed", None)
    table = READERS._installed
    yield table
    READERS.__dict__.pop("_installed")


def offer(table: dict[str, list[EntryPoint]], name: str, target: str) -> None:
    table[name] = [EntryPoint(name, target, "nucleate.readers")]


def test_files_are_known_by_their_names_and_first_bytes(file: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "b.pt")
    torch.save({"a": torch.ones(1)}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    shutil.copy(file, tmp_path / "0123abc")  # as in the cache of Hugging Face
    shutil.copy(tmp_path / "b.pt", tmp_path / "4567def")
    names = {"a.safetensors": "safetensors", "0123abc": "safetensors"}
    names |= {"b.pt": "torch", "4567def": "torch", "legacy": "torch"}
    for name, reader in names.items():
        assert open_checkpoint(tmp_path / name).format == reader, name


def test_safetensors_are_read_before_torch_files_of_one_folder(file: Path, tmp_path: Path) -> None:
    torch.save({"b": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path).format == "safetensors"
    assert list(open_checkpoint(tmp_path, reader="torch").tensors) == ["b"]


def test_nothing_there_names_what_is_next_to_it(file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"nothing has that name. Checkpoints in .*: a\.safetensors\."):
        open_checkpoint(tmp_path / "b")
    with pytest.raises(CheckpointNotFoundError, match=r"There is no folder .*/none either"):
        open_checkpoint(tmp_path / "none" / "b")
    file.unlink()
    with pytest.raises(CheckpointNotFoundError, match="There are no checkpoints in"):
        open_checkpoint(tmp_path / "b")
    with pytest.raises(CheckpointNotFoundError, match="nothing has that name"):
        open_checkpoint("zero \0")


def test_a_link_to_nothing_is_named_with_its_target(tmp_path: Path) -> None:
    os.symlink(tmp_path / "gone", tmp_path / "link")
    with pytest.raises(CheckpointNotFoundError, match="link to .*gone, which does not exist"):
        open_checkpoint(tmp_path / "link")


def test_a_folder_with_nothing_to_read_says_what_is_in_it(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "step-3").mkdir(parents=True)
    (folder / "log.txt").touch()
    with pytest.raises(
        CheckpointError, match=r"without a checkpoint; it holds log\.txt, step-3/\. The known formats are saf"
    ) as error:
        open_checkpoint(folder)
    assert "Did you mean" not in str(error.value)
    shutil.copy(file, folder / "step-3")
    with pytest.raises(CheckpointError, match=r"Did you mean .*/step-3/?\?"):
        open_checkpoint(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="an empty folder: there is no checkpoint in it"):
        open_checkpoint(tmp_path / "empty")


@pytest.mark.timeout(10)
def test_what_no_reader_knows_is_refused_pipes_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.txt is a file that no reader knows.*Installed readers: dcp, saf"):
        open_checkpoint(tmp_path / "a.txt")
    with pytest.raises(CheckpointError, match="pipe is a device, pipe or socket that no reader knows"):
        open_checkpoint(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        open_checkpoint(tmp_path / "pipe.safetensors")


def test_what_may_not_be_read_is_refused() -> None:
    with as_nobody() as folder:
        write_raw(folder / "a.safetensors", {"a": entry(0, 1)}, b"x")
        inner = folder / "inner"
        inner.mkdir()
        shutil.copy(folder / "a.safetensors", inner)
        for path in (folder / "a.safetensors", inner, inner / "a.safetensors"):
            assert open_checkpoint(path).tensors
        (folder / "a.safetensors").chmod(0)
        (inner / "a.safetensors").chmod(0)
        for path in (folder / "a.safetensors", inner / "a.safetensors"):
            with pytest.raises(CheckpointError, match="permission denied"):
                open_checkpoint(path)
        with pytest.raises(CheckpointError, match="a.safetensors cannot be opened: Permission denied"):
            open_checkpoint(inner)
        inner.chmod(0)
        with pytest.raises(CheckpointError, match="inner cannot be read: permission denied"):
            open_checkpoint(inner)
        inner.chmod(0o700)


def test_a_reader_can_be_chosen_by_name_or_as_an_object(file: Path) -> None:
    assert reader_for(file, "torch").name == "torch"
    reader = TextReader()
    assert reader_for(file, reader) is reader
    assert open_checkpoint(file, reader=reader).format == "text"
    with pytest.raises(CheckpointError, match="not a file of `torch.save`"):
        open_checkpoint(file, reader="torch")
    with pytest.raises(PluginNotFoundError, match="no reader plugin named 'saftensors'. Did you mean 'safetensors'"):
        open_checkpoint(file, reader="saftensors")
    with pytest.raises(ConfigurationError, match="neither a name nor a Reader"):
        open_checkpoint(file, reader=3)  # type: ignore[arg-type]


def test_an_installed_reader_reads_what_the_built_in_ones_do_not(
    file: Path, tmp_path: Path, installed: dict[str, list[EntryPoint]]
) -> None:
    offer(installed, "text", f"{__name__}:TextReader")
    (tmp_path / "a.text").touch()
    assert open_checkpoint(tmp_path / "a.text").format == "text"
    assert open_checkpoint(file).format == "safetensors"


def test_a_broken_reader_disturbs_nobody_and_is_named_where_nobody_else_reads(
    file: Path, tmp_path: Path, installed: dict[str, list[EntryPoint]]
) -> None:
    offer(installed, "absent", "no_such_package:Reader")
    offer(installed, "broken", f"{__name__}:BrokenReader")
    offer(installed, "text", f"{__name__}:TextReader")
    (tmp_path / "a.text").touch()
    (tmp_path / "a.other").touch()
    assert open_checkpoint(file).format == "safetensors"
    assert open_checkpoint(tmp_path / "a.text").format == "text"
    with pytest.raises(CheckpointError, match=r"no_such_package.*'broken'.*ZeroDivisionError"):
        open_checkpoint(tmp_path / "a.other")
