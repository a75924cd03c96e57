"""Archives of `torch.save`, each one file or a part of a file: the pickle as data, and the place of each storage.

This module maps no file and loads no tensor. `torch.load(mmap=True)` would find the same places. But a file that is
cut short while it is mapped kills the process, and torch's unpickler takes as much memory as a damaged file asks for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from nucleate.checkpoint.readers.file_kinds import kind_of_archive, kind_of_bytes
from nucleate.checkpoint.readers.torch.pickle_bytes import EndOfPickleError
from nucleate.checkpoint.readers.torch.pickled import Unpickler
from nucleate.checkpoint.readers.torch.tensor_notes import PickledTensor, StorageRef, storage_of
from nucleate.checkpoint.readers.torch.torch_pickle import Names
from nucleate.checkpoint.readers.torch.zip_directory import ZipDirectory, ZipEntry
from nucleate.checkpoint.stored.chunk import Chunk
from nucleate.checkpoint.stored.data_file import Bytes, HeldBytes
from nucleate.checkpoint.stored.swapped_bytes import SwappedBytes
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.errors import CheckpointError, CheckpointUnreadableError

# The number at the start of files from before torch 1.6, as a pickle (torch/serialization.py, MAGIC_NUMBER).
_MAGIC = 0x1950A86A20F9469CFC6C
# Most pickles are shorter than the first piece, which is read at once. Longer ones are read up to where they end.
_FIRST_PIECE_BYTES = 1 << 16
# Of the records with a word or a number.
_MAX_SMALL_BYTES = 1 << 10
# Python's objects take many times the bytes of their pickle.
_MAX_PICKLE_BYTES = 1 << 30

_T = TypeVar("_T")


class TorchArchive(ABC):
    """An archive.

    Attributes:
        value: The saved value, with a `PickledTensor` for each tensor.
        file: The file that holds the archive.
        num_pickle_bytes: The length of the pickles that were read.
        is_swapped: Whether a big-endian machine wrote the numbers.
    """

    value: Any
    file: Bytes
    num_pickle_bytes: int
    is_swapped: bool = False
    _swapped: dict[int, SwappedBytes]

    def chunk(self, tensor: PickledTensor) -> tuple[int, tuple[int, ...] | None]:
        """Return the place of a tensor's first element in the file, and its strides if it does not lie row by row.

        Raises:
            CheckpointError: The tensor's storage is missing or too short.
        """
        storage = tensor.storage
        offset, size_bytes = self.record(storage.key)
        if storage.begin_bytes + storage.size_bytes > size_bytes:
            raise CheckpointError(
                f"{self.file.name} is damaged: its storage {storage.key} has {size_bytes} bytes instead of "
                f"{storage.begin_bytes + storage.size_bytes}. Copy it again."
            )
        begin = offset + storage.begin_bytes + tensor.offset * tensor.dtype.itemsize
        return begin, None if lies_row_by_row(tensor) else tensor.stride

    def stored(self, key: str, tensor: PickledTensor) -> StoredTensor:
        """Return the stored tensor for a pickled tensor, with the key `key`."""
        offset, stride = self.chunk(tensor)
        file = self._numbers_of(tensor.storage.dtype)
        chunk = Chunk(file, offset, (0,) * len(tensor.shape), tensor.shape, stride)
        stored = StoredTensor(key, tensor.dtype, tensor.shape, (chunk,))
        if (tensor.is_conjugate or tensor.is_negative) and 0 not in tensor.shape:
            # torch marked the tensor instead of computing it. Compute all stored elements, as the tensor may have gaps.
            extent = chunk.extent_bytes(tensor.dtype)
            numbers = torch.empty(extent // tensor.dtype.itemsize, dtype=tensor.dtype, device="cpu")
            file.read_into(numbers.data_ptr(), extent, offset)
            numbers = numbers.conj().resolve_conj() if tensor.is_conjugate else numbers
            numbers = -numbers if tensor.is_negative else numbers
            held = Chunk(HeldBytes(self.file.name, numbers), 0, chunk.begin, chunk.shape, stride)
            stored = StoredTensor(key, tensor.dtype, tensor.shape, (held,))
        return stored

    def _numbers_of(self, dtype: torch.dtype) -> Bytes:
        """Return the file with the numbers of a storage in the order of this machine, the same object for each size."""
        item_bytes = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
        if not self.is_swapped or item_bytes == 1:
            return self.file
        if item_bytes not in self._swapped:
            self._swapped[item_bytes] = SwappedBytes(self.file, item_bytes)
        return self._swapped[item_bytes]

    @abstractmethod
    def record(self, key: str) -> tuple[int, int]:
        """Return the place where the bytes of a storage begin in the file, and their number."""


class ZipTorchArchive(TorchArchive):
    """An archive as torch has written it since 1.6.

    Args:
        file: The file that holds the archive.
        begin: The place in the file where the archive begins.
        size_bytes: The length of the archive. By default, it reaches to the end of the file.

    Raises:
        CheckpointError: The archive is damaged, or `torch.save` did not write it.
    """

    def __init__(self, file: Bytes, begin: int = 0, size_bytes: int | None = None) -> None:
        self.file = file
        self._swapped = {}
        self._begin = begin
        size_bytes = file.size_bytes - begin if size_bytes is None else size_bytes
        self._directory = ZipDirectory(lambda offset, size: file.read(begin + offset, size), size_bytes, file.name)
        self._prefix = prefix_of(self._directory, file.name)
        self._records: dict[str, ZipEntry] = {}
        if f"{self._prefix}byteorder" in self._directory:
            self.is_swapped = self._bytes("byteorder") != b"little"
        record = self._directory.record(f"{self._prefix}data.pkl")
        self.value, self.num_pickle_bytes = _grown(file, begin + record.offset, record.size_bytes, self._value)

    def record(self, key: str) -> tuple[int, int]:
        if key not in self._records:
            self._records[key] = self._directory.record(f"{self._prefix}data/{key}")
        found = self._records[key]
        return self._begin + found.offset, found.size_bytes

    def _bytes(self, name: str) -> bytes:
        record = self._directory.record(f"{self._prefix}{name}")
        return self.file.read(self._begin + record.offset, min(record.size_bytes, _MAX_SMALL_BYTES))

    def _value(self, data: bytes) -> Any:
        return Unpickler(data, Names(), self._storage, name=self.file.name).load()

    def _storage(self, persistent_id: Any) -> StorageRef:
        return storage_of(persistent_id)


class LegacyTorchArchive(TorchArchive):
    """An archive as torch wrote it before 1.6, and still writes it with `_use_new_zipfile_serialization=False`.

    It begins with five pickles: a number, a version, the machine's properties, the saved value, and the keys of the
    storages. The storages follow. Each consists of its number of elements in 8 bytes, and the elements.

    Args:
        file: The file, which begins with the archive.

    Raises:
        CheckpointError: The archive is damaged, or `torch.save` did not write it.
    """

    def __init__(self, file: Bytes) -> None:
        self.file = file
        self._storages: dict[str, StorageRef] = {}
        (keys, position), self.num_pickle_bytes = _grown(file, 0, file.size_bytes, self._read_pickles)
        self._places = self._read_places(keys, position)

    def record(self, key: str) -> tuple[int, int]:
        if key not in self._places:
            raise CheckpointError(f"{self.file.name} is damaged: it has no storage {key}. Copy it again.")
        return self._places[key]

    def _read_pickles(self, data: bytes) -> tuple[list[Any], int]:
        self._storages.clear()
        position = 0
        found = []
        names = Names()
        for _ in range(5):
            unpickler = Unpickler(data, names, self._storage, name=self.file.name, start=position)
            found.append(unpickler.load())
            position = unpickler.position
        _, version, system, self.value, keys = found
        if version != 1001 or not isinstance(system, dict) or not isinstance(keys, list):
            raise CheckpointError(f"{self.file.name} is damaged: it is not a file of version 1001. Copy it again.")
        # The numbers are little-endian, whatever machine wrote them (torch/csrc/serialization.cpp, `writeFileRaw`).
        return keys, position

    def _read_places(self, keys: list[Any], position: int) -> dict[str, tuple[int, int]]:
        places: dict[str, tuple[int, int]] = {}
        for key in keys:
            storage = self._storages.get(key) if isinstance(key, str) else None
            if storage is None or key in places:
                raise CheckpointError(f"{self.file.name} is damaged: its list of storages is wrong. Copy it again.")
            numel = int.from_bytes(self.file.read(position, 8), "little")
            position += 8
            if numel * storage.dtype.itemsize != storage.size_bytes or position + storage.size_bytes > (
                self.file.size_bytes
            ):
                raise CheckpointError(
                    f"{self.file.name} is damaged: its storage {key} has {storage.size_bytes} bytes, but it announces "
                    f"{numel} elements of {storage.dtype}, and {self.file.size_bytes - position} bytes are left. Copy "
                    "it again."
                )
            places[key] = position, storage.size_bytes
            position += storage.size_bytes
        return places

    def _storage(self, persistent_id: Any) -> Any:
        if type(persistent_id) is tuple and persistent_id[0] == "module":
            return persistent_id[1]  # a class, with its source
        storage = storage_of(persistent_id)
        if storage.key not in self._storages:
            self._storages[storage.key] = storage_of(persistent_id[:5])
        return storage


def open_archive(file: Bytes) -> TorchArchive:
    """Return the archive that `torch.save` wrote to `file`.

    Raises:
        CheckpointError: The file is damaged, or `torch.save` did not write it.
    """
    start = file.read(0, min(512, file.size_bytes))
    if not start:
        raise CheckpointError(f"{file.name} is empty. Copy it again.")
    if is_legacy(start):
        return LegacyTorchArchive(file)
    if start.startswith(b"PK"):
        return ZipTorchArchive(file)
    if (kind := kind_of_bytes(start)) is not None:
        raise kind.refusal(file.name)
    if start[:1] == b"\x80":
        raise CheckpointUnreadableError(
            f"{file.name} is a pickle that `torch.save` did not write. Loading it would run the code that it names. If "
            "you trust it, load it with `pickle` and save a state dict of tensors with `torch.save`."
        )
    raise CheckpointError(
        f"{file.name} is not a file of `torch.save`: it begins with {start[:8]!r}. It is damaged or of another format; "
        "copy it again, or give the name of its reader."
    )


def _grown(file: Bytes, offset: int, size_bytes: int, read: Callable[[bytes], _T]) -> tuple[_T, int]:
    """Read a pickle, and return the result and the number of bytes that were read.

    The pickle may be much shorter than the bytes that the file has for it, and the rest may be a hole of terabytes.

    Args:
        file: The file.
        offset: The place in the file where the pickle begins.
        size_bytes: The greatest length of the pickle.
        read: Reads the pickle. It raises `EndOfPickleError` if it needs more bytes.
    """
    length = min(_FIRST_PIECE_BYTES, size_bytes)
    while True:
        try:
            return read(file.read(offset, length)), length
        except EndOfPickleError:
            if length == size_bytes:
                raise
            if length == _MAX_PICKLE_BYTES:
                raise CheckpointUnreadableError(
                    f"{file.name} has a pickle of more than {length} bytes, which would take many times that memory. "
                    "Save large values as tensors."
                ) from None
            length = min(8 * length, size_bytes, _MAX_PICKLE_BYTES)


def is_legacy(start: bytes) -> bool:
    """Return whether a file that begins with `start` has the format from before torch 1.6."""
    return start[:1] == b"\x80" and _MAGIC.to_bytes(10, "little") in start[:40]


def prefix_of(directory: ZipDirectory, name: str) -> str:
    """Return the prefix of the names of all records.

    Raises:
        CheckpointUnreadableError: `torch.save` did not make the archive.
    """
    names = directory.names()
    if (kind := kind_of_archive(names)) is not None:
        raise kind.refusal(name)
    found = [record for record in names if record.endswith("data.pkl") and record.count("/") <= 1]
    if len(found) != 1 or found[0].rpartition("/")[2] != "data.pkl":
        raise CheckpointUnreadableError(
            f"{name} is a zip archive, but not a file of `torch.save`: it has {len(found)} records called data.pkl."
        )
    return found[0].removesuffix("data.pkl")


def lies_row_by_row(tensor: PickledTensor) -> bool:
    """Return whether the elements of a tensor follow one another in the order of their indices."""
    expected = 1
    for length, step in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if length != 1 and step != expected:
            return 0 in tensor.shape
        expected *= length
    return True
