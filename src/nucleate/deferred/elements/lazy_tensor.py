"""Lazy tensors of other libraries, read on first use: Lightning Fabric's `_lazy_load`, which is litgpt's `lazy_load`.

They are recognized by their attributes, because several libraries have copies of that code. Each lazy tensor names a
record of a zip archive. nucleate reads only the wanted range of that record; the library itself reads the whole record.
"""

from __future__ import annotations

import ctypes
import gc
import os
import stat
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from nucleate.deferred.elements.element_source import ElementSource
from nucleate.errors import CheckpointError

_PARTS = ("metatensor", "archiveinfo", "storageinfo", "rebuild_args")
#: The files of archive readers, as long as the readers live: a reader knows its records' places, but not its path.
_files: weakref.WeakKeyDictionary[Any, _File | None] = weakref.WeakKeyDictionary()
#: In each thread, the tensor that a library read last.
_held = threading.local()


def given_of_lazy(value: Any) -> ElementSource | None:
    """Return an element source for a tensor that its library has not read yet, or None for any other value.

    Args:
        value: Anything. A lazy tensor is not a `torch.Tensor`: it has a `metatensor`, a `storageinfo` (the persistent
            id of its storage), `rebuild_args` and an `archiveinfo` with a `file_reader`.
    """
    if not _is_lazy(value):
        return None
    shape, stride = (tuple(part) for part in value.rebuild_args[1:3])
    found = memory_of_lazy(value) if stride == _row_by_row(shape) else None
    if found is None:
        return LazyWhole(value.metatensor.dtype, shape, value, f"data/{value.storageinfo[2]}")
    found.shape = shape
    return found


def memory_of_lazy(value: Any) -> LazyRecord | None:
    """Return the memory in the file from a lazy tensor's first element to its last one, as a tensor of one dim.

    Args:
        value: Anything.

    Returns:
        The element source, or None if the value is not a lazy tensor or its file cannot be found.
    """
    # Behind the five arguments, torch keeps marks for operations that it has not computed, such as a conjugate.
    if not _is_lazy(value) or any(value.rebuild_args[5:]):
        return None
    file = _file_of(value.archiveinfo.file_reader)
    if file is None:
        return None
    begin, shape, stride = value.rebuild_args[:3]
    dtype = value.metatensor.dtype
    extent = 0 if 0 in shape else 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    offset = value.archiveinfo.file_reader.get_record_offset(f"data/{value.storageinfo[2]}")
    return LazyRecord(dtype, (extent,), file, offset + begin * dtype.itemsize)


def _is_lazy(value: Any) -> bool:
    if isinstance(value, Tensor) or not all(part in getattr(value, "__dict__", ()) for part in _PARTS):
        return False
    return isinstance(value.metatensor, Tensor) and hasattr(value.archiveinfo, "file_reader")


class LazyRecord(ElementSource):
    """A lazy tensor that lies in its file row by row, so that ranges can be read.

    Args:
        dtype: The dtype of its elements.
        shape: The tensor's shape.
        file: The archive.
        offset: The place of the first element in the archive, in bytes.
    """

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], file: _File, offset: int) -> None:
        self.dtype = dtype
        self.shape = shape
        self._file = file
        self._offset = offset

    def read(self, start: int, out: Tensor) -> None:
        itemsize = self.dtype.itemsize
        self._file.read_into(out.data_ptr(), out.numel() * itemsize, self._offset + start * itemsize)

    def check_unchanged(self) -> None:
        self._file.check_unwritten()

    def order(self, start: int) -> tuple[int, int]:
        return (self._file.number, self._offset + start * self.dtype.itemsize)

    def describe(self) -> str:
        return repr((os.path.basename(self._file.path), self._offset, self.dtype, self.shape))


class LazyWhole(ElementSource):
    """A lazy tensor that only its library can read. The first read loads it whole; the read of its end frees it.

    Args:
        dtype: The dtype of its elements.
        shape: The tensor's shape.
        lazy: The library's object.
        record: The name of its storage in the archive.
    """

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], lazy: Any, record: str) -> None:
        self.dtype = dtype
        self.shape = shape
        self._lazy = lazy
        self._record = record
        self._loaded: Tensor | None = None

    def read(self, start: int, out: Tensor) -> None:
        loaded = self._loaded
        if loaded is None:
            last = getattr(_held, "last", None)
            if last is not None and (other := last()) is not None:
                other._loaded = None  # A thread holds one whole tensor at a time.
            with torch.no_grad():
                self._loaded = loaded = _load(self._lazy).detach().reshape(-1)
            _held.last = weakref.ref(self)
        out.copy_(loaded[start : start + out.numel()])
        if start + out.numel() == loaded.numel():
            self._loaded = None

    def order(self, start: int) -> tuple[int, int]:
        return (-1, int(self._lazy.archiveinfo.file_reader.get_record_offset(self._record)) + start)

    def describe(self) -> str:
        return repr((self._record, self._lazy.rebuild_args[:3], self.dtype))


class _File:
    """The archive of an archive reader, opened a second time.

    Args:
        descriptor: The open file. It is closed when no tensor of the archive is used any more.
        path: The name of the file in messages.
    """

    def __init__(self, descriptor: int, path: str) -> None:
        self.path = path
        self.number = descriptor
        self._descriptor = descriptor
        self._written_ns = os.fstat(descriptor).st_mtime_ns
        weakref.finalize(self, os.close, descriptor)

    def check_unwritten(self) -> None:
        """Make sure that nobody has written to the file since it was opened.

        Raises:
            CheckpointError: Somebody has written to it.
        """
        if os.fstat(self._descriptor).st_mtime_ns != self._written_ns:
            raise CheckpointError(f"{self.path} was written to since it was opened for lazy loading")

    def read_into(self, address: int, size_bytes: int, offset: int) -> None:
        """Copy bytes to memory.

        Raises:
            CheckpointError: The file ends too early, or the disk fails.
        """
        done = 0
        while done < size_bytes:
            wanted = min(size_bytes - done, 1 << 30)
            try:
                memory = (ctypes.c_char * wanted).from_address(address + done)
                copied = os.preadv(self._descriptor, [memory], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"reading {self.path} at byte {offset + done} failed: {error.strerror}."
                ) from error
            if not copied:
                raise CheckpointError(f"{self.path} was cut short at byte {offset + done}. Copy it again.")
            done += copied


def _load(lazy: Any) -> Tensor:
    """Return the whole tensor, read by its library; inside `init_module` the class may have a wrapped method."""
    method = getattr(type(lazy)._load_tensor, "__wrapped__", type(lazy)._load_tensor)
    loaded: Tensor = method(lazy)
    return loaded


def _file_of(reader: Any) -> _File | None:
    """Return the file that one of torch's archive readers has open, or None if it cannot be found.

    A reader does not give its path. Linux lists the open files of the process. The reader's file is the one that has
    the reader's pickle at the reader's offset.
    """
    if reader not in _files:
        _files[reader] = _find(reader)
    return _files[reader]


def _find(reader: Any) -> _File | None:
    names = [name for name in (".data/serialization_id", "data.pkl") if reader.has_record(name)]
    wanted = [(reader.get_record_offset(name), reader.get_record(name)) for name in names]
    links = _links(wanted)
    if len(links) > 1:
        # The library's readers are part of reference cycles: a reader that nobody uses any more keeps its file open.
        gc.collect()
        links = _links(wanted)
    if len(links) != 1:
        return None  # If two open files are equal, either one may be changed later.
    try:
        return _File(os.open(links[0], os.O_RDONLY | os.O_CLOEXEC), os.readlink(links[0]))
    except OSError:
        return None


def _links(wanted: list[tuple[int, bytes]]) -> list[str]:
    """Return the open files of this process that have the wanted bytes at the wanted offsets, each file once."""
    try:
        numbers = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    except OSError:
        return []
    found: dict[tuple[int, int], str] = {}
    for number in numbers:
        try:
            status = os.fstat(number)
            is_file = stat.S_ISREG(status.st_mode)
            if is_file and all(os.pread(number, len(data), offset) == data for offset, data in wanted):
                found[status.st_dev, status.st_ino] = f"/proc/self/fd/{number}"
        except OSError:
            continue  # The file was closed meanwhile, or is not readable.
    return list(found.values())


def _row_by_row(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for length in reversed(shape[1:]):
        strides.append(strides[-1] * max(length, 1))
    return tuple(reversed(strides[: len(shape)]))
