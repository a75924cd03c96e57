"""Files are read by position, into memory, and fail with an error that names them."""

from __future__ import annotations

import ctypes
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nucleate.checkpoint.stored.data_file import DataFile, HeldBytes, first_bytes
from nucleate.errors import CheckpointError, CheckpointNotFoundError
from tests.checkpoint.readers.reading import as_nobody


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "data").write_bytes(bytes(range(256)))
    return tmp_path / "data"


def test_bytes_come_from_where_they_are_asked_for(path: Path) -> None:
    file = DataFile(path)
    out = torch.zeros(4, dtype=torch.uint8)
    file.read_into(out.data_ptr(), 4, 100)
    assert out.tolist() == [100, 101, 102, 103]
    assert file.read(254, 2) == b"\xfe\xff"
    assert file.read(256, 0) == b""
    assert file.size_bytes == 256


def test_many_threads_read_one_file(path: Path) -> None:
    file = DataFile(path)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda n: file.read(n % 256, 1) == bytes([n % 256]), range(2000)))


def test_a_file_that_is_replaced_or_removed_stays_what_it_was(path: Path) -> None:
    file = DataFile(path)
    path.with_name("new").write_bytes(bytes(256))
    os.replace(path.with_name("new"), path)
    assert file.read(7, 1) == b"\x07"
    path.unlink()
    assert file.read(7, 1) == b"\x07"


def test_a_file_that_is_cut_short_after_it_was_opened_is_an_error_that_names_it(path: Path) -> None:
    file = DataFile(path)
    os.truncate(path, 102)
    out = torch.zeros(4, dtype=torch.uint8)
    message = r"data ends at byte 102, but bytes 100 to 104 .* cut short after it was opened with 256 bytes"
    with pytest.raises(CheckpointError, match=message):
        file.read_into(out.data_ptr(), 4, 100)
    with pytest.raises(CheckpointError, match=message):
        file.read(100, 4)


def test_more_than_a_file_has_is_refused_before_memory_is_taken(path: Path) -> None:
    for offset, size_bytes in [(0, 1 << 50), (256, 1), (1 << 62, 1), (-1, 1), (0, -1)]:
        with pytest.raises(CheckpointError, match="data ends at byte 256"):
            DataFile(path).read(offset, size_bytes)


def test_what_is_no_file_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in [("pipe", "not a regular file"), (".", "a folder"), ("/dev/null", "not a regular file")]:
        with pytest.raises(CheckpointError, match=message):
            DataFile(tmp_path / name)
    for name in ["absent", "half \ud800", "zero \0"]:
        with pytest.raises(CheckpointNotFoundError, match="there is no file"):
            DataFile(tmp_path / name)


def test_a_file_that_may_not_be_read_is_refused_by_name() -> None:
    with as_nobody() as folder:
        (folder / "data").touch(0)
        with pytest.raises(CheckpointError, match="data cannot be opened: Permission denied"):
            DataFile(folder / "data")


def test_a_closed_file_leaves_no_descriptor(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        DataFile(path).read(0, 1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_more_files_than_the_system_allows_is_an_error_that_says_what_to_do(path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        with pytest.raises(CheckpointError, match=r"Too many open files\. Allow more, such as `ulimit -n"):
            _ = [DataFile(path) for _ in range(1000)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_bytes_in_memory_are_read_alike() -> None:
    held = HeldBytes("it", torch.arange(4, dtype=torch.int16))
    out = ctypes.create_string_buffer(4)
    held.read_into(ctypes.addressof(out), 4, 2)
    assert out.raw == held.read(2, 4) == b"\x01\x00\x02\x00"
    assert (held.name, held.size_bytes) == ("it", 8)


def test_the_first_bytes_of_nothing_are_none(path: Path) -> None:
    assert first_bytes(path, 3) == b"\x00\x01\x02"
    assert len(first_bytes(path, 1000)) == 256
    assert first_bytes(path.with_name("absent"), 3) == b""
