"""A load reads one save, whatever other processes save to the same place, and closes its files afterwards."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nucleate.checkpoint import load, load_raw, save, verify
from nucleate.checkpoint.disk.save_mark import SaveMark
from nucleate.checkpoint.readers import one_save, opening
from nucleate.checkpoint.readers.base import Reader
from nucleate.checkpoint.readers.dcp.dcp import DCPReader
from nucleate.checkpoint.readers.safetensors import SafetensorsReader
from nucleate.checkpoint.stored.contents import Contents
from nucleate.checkpoint.stored.open_folder import OpenFolder
from nucleate.cluster import Communicator
from nucleate.deferred import deferred
from nucleate.errors import CheckpointError, CheckpointKeyError, CheckpointNotFoundError
from nucleate.materialize import materialize

FORMATS = ["safetensors", "dcp"]


def state(number: int) -> dict[str, Any]:
    return {"number": number, **{f"t{name}": torch.full((100,), float(number)) for name in range(4)}}


def write(path: Path, number: int, solo: Communicator, format: str | None) -> None:
    save(path, state(number), solo, format=format, max_shard_size=500)


def numbers(found: dict[str, Any]) -> set[float]:
    return {float(value) for name in range(4) for value in found[f"t{name}"]} | {float(found["number"])}


def once(action: Callable[[], None], before: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function `before`, which does an action the first time it is called."""
    waiting = [action]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if waiting:
            waiting.pop()()
        return before(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize(
    ("format", "which"),
    [("safetensors", "names"), ("safetensors", "has"), ("safetensors", "open"), ("dcp", "has"), ("dcp", "open")],
)
def test_a_save_between_two_reads_is_noticed_and_the_new_save_is_read(
    tmp_path: Path, solo: Communicator, monkeypatch: pytest.MonkeyPatch, format: str, which: str
) -> None:
    path = tmp_path / "c"
    write(path, 1, solo, format)
    monkeypatch.setattr(OpenFolder, which, once(lambda: write(path, 2, solo, format), getattr(OpenFolder, which)))
    assert numbers(load(path, None, solo)) == {2.0}


def test_another_format_may_take_the_place_meanwhile(
    tmp_path: Path, solo: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    write(path, 1, solo, "safetensors")
    monkeypatch.setattr(SafetensorsReader, "read", once(lambda: write(path, 2, solo, "dcp"), SafetensorsReader.read))
    assert numbers(load(path, None, solo)) == {2.0}


def test_a_folder_that_is_replaced_while_it_is_open_stays_the_old_one(tmp_path: Path, solo: Communicator) -> None:
    path = tmp_path / "c"
    write(path, 1, solo, "safetensors")
    with OpenFolder(path) as folder:
        before = folder.names()
        file = folder.open(before[0])
        os.rename(path, tmp_path / "old")
        path.mkdir()
        (path / "other").write_text("new")
        assert folder.names() == before
        assert not folder.has("other")
        assert folder.open(before[1]).size_bytes == (tmp_path / "old" / before[1]).stat().st_size
        shutil.rmtree(tmp_path / "old")
        with pytest.raises(CheckpointNotFoundError, match="there is no file"):
            folder.open(before[2])
    assert file.read(0, 1)


@pytest.mark.parametrize("format", FORMATS)
def test_saves_that_never_pause_are_an_error_that_says_so(
    tmp_path: Path, solo: Communicator, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    path = tmp_path / "c"
    write(path, 0, solo, format)
    number = 0
    read = opening._read

    def saving(*args: Any) -> Contents:
        nonlocal number
        number += 1
        write(path, number, solo, format)
        return read(*args)

    monkeypatch.setattr(opening, "_read", saving)
    before = open_files(tmp_path)
    with pytest.raises(CheckpointError, match="was replaced while it was read. Nothing was loaded. Load it again"):
        load(path, None, solo)
    assert number == one_save._ATTEMPTS
    assert open_files(tmp_path) == before


def test_a_reader_of_a_plugin_that_reads_by_path_does_not_mix_saves(tmp_path: Path, solo: Communicator) -> None:
    path = tmp_path / "c"
    write(path, 1, solo, "dcp")

    class ByPath(Reader):
        name = "by-path"

        def claims(self, path: Path) -> bool:
            return True

        def read(self, path: Path) -> Contents:
            found = DCPReader().read(path)
            first()
            return found

    first = once(lambda: write(path, 2, solo, "dcp"), lambda: None)
    assert numbers(load(path, None, solo, reader=ByPath())) == {2.0}


def test_a_file_that_another_program_rewrites_in_place_is_noticed(
    tmp_path: Path, solo: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `torch.save` and `torch.distributed.checkpoint` write: into the files that are there."""
    path = tmp_path / "c"
    write(path, 1, solo, "safetensors")
    shard = next(path.glob("model-00001*"))
    data = shard.read_bytes()
    done = opening._read
    monkeypatch.setattr(
        opening, "_read", once(lambda: None, lambda *args: (done(*args), shard.write_bytes(data), os.utime(shard))[0])
    )
    with pytest.raises(CheckpointError, match="was replaced while it was read"):
        load(path, None, solo)


def test_a_file_that_is_rewritten_before_its_tensors_are_read_is_an_error(tmp_path: Path, solo: Communicator) -> None:
    path = tmp_path / "c.pt"
    model = nn.Linear(4, 4)
    save(path, model, solo)
    with deferred():
        late = nn.Linear(4, 4)
    load_raw(path, late, solo)
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="c.pt was written to since"):
        materialize(late)


def test_what_a_load_has_opened_is_read_after_a_later_save(tmp_path: Path, solo: Communicator) -> None:
    for format in FORMATS:
        path = tmp_path / format
        model, other = nn.Linear(4, 4), nn.Linear(4, 4)
        save(path, model, solo, format=format)
        with deferred():
            late = nn.Linear(4, 4)
        load_raw(path, late, solo)
        save(path, other, solo, format=format)
        materialize(late)
        assert torch.equal(late.weight, model.weight)


def test_marks_tell_saves_apart(tmp_path: Path, solo: Communicator) -> None:
    path, moved = tmp_path / "c", tmp_path / "moved"
    write(path, 1, solo, "dcp")
    first = SaveMark.of(path)
    assert first is not None
    assert SaveMark.of(path) == first
    shutil.copytree(path, moved)
    copied = SaveMark.of(moved)
    assert copied is not None
    assert not copied.is_other(first), "a copy on another node is the same save"
    write(path, 1, solo, "dcp")
    second = SaveMark.of(path)
    assert second is not None
    assert second.is_other(first)
    assert SaveMark.of(tmp_path / "absent") is None


def test_marks_of_files_without_an_id_are_compared_on_one_machine_only(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"one")
    first = SaveMark.of(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    second = SaveMark.of(path)
    assert first is not None
    assert second is not None
    assert second.is_other(first)
    assert not second._replace(machine="another").is_other(first)


def open_files(folder: Path) -> int:
    """Return the number of open files in a folder."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{number}").startswith(str(folder))
        except OSError:
            continue
    return found


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Turn garbage collection off, which would close files that are in a cycle."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="only Linux lists the open files of a process")
@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("name", ["c", "dcp", "c.pt", "c.safetensors"])
def test_files_are_closed_when_a_load_needs_them_no_more(tmp_path: Path, solo: Communicator, name: str) -> None:
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)])
    path = tmp_path / name
    save(path, model, solo, format={"c": "safetensors", "dcp": "dcp"}.get(name), max_shard_size=400)
    found = load(path, None, solo)
    assert open_files(tmp_path) == 0, "after `load`"
    del found
    load(path, model, solo)
    load_raw(path, model, solo)
    assert open_files(tmp_path) == 0, "after loads into a real model"
    assert verify(path, against=path).is_good
    assert open_files(tmp_path) == 0, "after `verify`"
    with pytest.raises(CheckpointKeyError) as kept:
        load_raw(path, nn.Linear(3, 3), solo)
    with pytest.raises(CheckpointKeyError) as also:
        load(path, {"model": nn.Linear(3, 3)}, solo)
    assert open_files(tmp_path) == 0, f"after {kept.value} and {also.value}"
    with deferred():
        late = nn.Sequential(*[nn.Linear(8, 8) for _ in range(5)])
    load_raw(path, late, solo)
    assert open_files(tmp_path) > 0, "a deferred model is bound to the files"
    materialize(late)
    assert open_files(tmp_path) == 0, "after the model is made"
    assert torch.equal(late[4].weight, model[4].weight)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="only Linux lists the open files of a process")
@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("format", FORMATS)
def test_files_are_closed_when_a_header_is_damaged(tmp_path: Path, solo: Communicator, format: str) -> None:
    path = tmp_path / "c"
    write(path, 1, solo, format)
    last = sorted(path.glob("*.safetensors" if format == "safetensors" else "*.distcp"))[-1]
    last.write_bytes(b"damaged")
    with pytest.raises(CheckpointError) as kept:
        load(path, None, solo)
    assert open_files(tmp_path) == 0, f"after {kept.value}"
