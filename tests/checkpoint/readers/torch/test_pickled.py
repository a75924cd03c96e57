"""Small files that are made to keep a reader busy or to fill its memory: refused at once, by their names."""

from __future__ import annotations

import argparse
import io
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from nucleate import Runtime
from nucleate.checkpoint.readers import open_checkpoint
from nucleate.checkpoint.readers.torch.pickled import Unpickler
from nucleate.checkpoint.readers.torch.torch_pickle import find
from nucleate.errors import CheckpointError, CheckpointUnreadableError

# The slowest takes a tenth of this where nothing else runs.
SECONDS = 5.0


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def doubling(begin: bytes, end: bytes, levels: int = 30, width: int = 10) -> bytes:
    """Return the pickle of a list or tuple that holds one ten times, which holds another ten times, and so on."""
    out = b"]r" + struct.pack("<I", 100) if begin == b"](" else b")r" + struct.pack("<I", 100)
    for level in range(levels):
        out += b"0" + begin + (b"j" + struct.pack("<I", 100 + level)) * width + end
        out += b"r" + struct.pack("<I", 101 + level)
    return out


def large_numbers() -> bytes:
    """Return a dict of numbers that all have the same hash, so that Python compares each with all others."""
    keys = (
        b"\x8a\x0a" + (number * (2**61 - 1)).to_bytes(10, "little") + b"N"
        for number in range(1 << 10, (1 << 10) + 50_000)
    )
    return b"\x80\x02}(" + b"".join(keys) + b"u."


PICKLES: dict[str, bytes] = {
    "nested lists as a value": b"\x80\x02}" + text("a") + doubling(b"](", b"e") + b"s.",
    "nested tuples as a value": b"\x80\x02}" + text("a") + doubling(b"(", b"t") + b"s.",
    "nested lists in a key": b"\x80\x02}" + doubling(b"](", b"e") + b"\x85" + text("x") + b"s.",
    "nested tuples in a key": b"\x80\x02}" + doubling(b"(", b"t", levels=15) + b"\x85" + text("x") + b"s.",
    "nested tuples in a set": b"\x80\x04\x8f(" + doubling(b"(", b"t", levels=15) + b"\x90.",
    "one long key again and again": b"\x80\x02}(" + b"(" + b"K\x01" * 900 + b"tq\x01N" + b"h\x01N" * 50_000 + b"u.",
    "a key of 10,000 digits": b"\x80\x02}\x8b" + struct.pack("<i", 4200) + b"\x7f" * 4200 + text("x") + b"s.",
    "numbers that share a hash": large_numbers(),
    "a layout that lists name": b"\x80\x02ctorch.serialization\n_get_layout\n" + doubling(b"](", b"e") + b"\x85R.",
    "a call of a call of a call": b"\x80\x02cx\ny\n" + b")R" * 100_000 + b".",
    "a key of 1 MB": b"\x80\x02}" + text("k" * 1_000_000) + b"Ns.",
    "keywords that are not names": b"\x80\x02cx\ny\n)}K\x01K\x02s\x92.",
}  # fmt: skip


def zipped(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", b"3\n")
    return path


def refused(path: Path) -> CheckpointError:
    begin = time.monotonic()
    with pytest.raises(CheckpointError) as error:
        Runtime(accelerator="cpu").load_raw(path, nn.Linear(1, 1))
    assert time.monotonic() - begin < SECONDS
    assert str(path) in str(error.value)
    assert len(str(error.value)) <= 1000
    return error.value


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", PICKLES)
def test_work_grows_with_the_file_and_not_with_what_it_says(tmp_path: Path, kind: str) -> None:
    refused(zipped(tmp_path / "a.pt", PICKLES[kind]))


def hole(path: Path, names: list[bytes], size: int, directory: int = 0) -> Path:
    """Write an archive whose first record is a hole of `size` bytes; with `directory`, its directory is a hole too."""
    head = b""
    local = (
        struct.pack("<4s5H3I2H", b"PK\x03\x04", 45, 0, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, len(names[0]), 0) + names[0]
    )
    for name in names:
        extra = struct.pack("<HHQQ", 1, 16, size, size)
        fields = (45, 45, 0, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra), 0, 0, 0, 0, 0)
        head += struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *fields) + name + extra
    where, length = len(local) + size, directory or len(head)
    tail = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, len(names), len(names), length, where)
    tail += struct.pack("<4sIQI", b"PK\x06\x07", 0, where + length, 1)
    tail += struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, min(length, 0xFFFFFFFF), 0xFFFFFFFF, 0)
    with open(path, "wb") as file:
        file.write(local)
        file.seek(where)
        file.write(head if not directory else b"")
        file.seek(where + length)
        file.write(tail)
    return path


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "write",
    [
        lambda path: hole(path, [b"archive/data.pkl"], 20 << 30),
        lambda path: hole(path, [b"archive/data.pkl", b"archive/byteorder"], 20 << 30),
        lambda path: hole(path, [b"archive/data.pkl"], 100, directory=20 << 30),
        lambda path: _sparse(path, b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", 20 << 30),
    ],
    ids=["data.pkl", "data.pkl and byteorder", "directory", "old format"],
)
def test_a_hole_is_not_read(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    refused(write(tmp_path / "hole.pt"))


def _sparse(path: Path, start: bytes, size: int) -> Path:
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)
    return path


def test_a_long_pickle_is_read_to_its_end(tmp_path: Path) -> None:
    state = {"text": "x" * 3_000_000, "weight": torch.ones(2), "numbers": list(range(100_000))}
    for zipped_format in (True, False):
        torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped_format)
        skeleton = open_checkpoint(tmp_path / "a.pt").skeleton
        assert (len(skeleton["text"]), skeleton["numbers"][-1]) == (3_000_000, 99_999)


def test_an_allowed_object_that_is_shared_many_times_is_made_once(tmp_path: Path) -> None:
    value: object = argparse.Namespace(a=1)
    for _ in range(40):
        value = argparse.Namespace(left=value, right=value)
    torch.save({"value": value}, tmp_path / "a.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        made = open_checkpoint(tmp_path / "a.pt").skeleton["value"]
    assert made.left is made.right


def test_a_pickle_of_the_first_protocol_is_named(tmp_path: Path) -> None:
    zipped(tmp_path / "a.pt", pickle.dumps({"a": [1.5, "x"]}, 0))
    with pytest.raises(CheckpointUnreadableError, match="protocol 0 or 1"):
        open_checkpoint(tmp_path / "a.pt")


def test_text_with_halves_of_characters_is_kept(tmp_path: Path) -> None:
    torch.save({"name": "a\udcff"}, tmp_path / "a.pt")
    assert open_checkpoint(tmp_path / "a.pt").skeleton == {"name": "a\udcff"}


def test_a_note_keeps_everything_that_the_pickle_does_to_it() -> None:
    data = io.BytesIO()
    pickle.Pickler(data, 2).dump(argparse.Namespace(a=1))
    note = Unpickler(data.getvalue(), find, name="x").load()
    assert (note.name, note.is_new, note.args) == ("argparse.Namespace", True, ())
    assert [state for _, state in note.steps] == [{"a": 1}]
