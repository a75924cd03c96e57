"""Archives of `torch.save`, each one file or a part of a file: the pickle as data, and the place of each storage.

This module maps no file and loads no tensor. `torch.load(mmap=True)` would find the same places. But a file that is
cut short while it is mapped kills the process, and torch's unpickler takes as much memory as a damaged file asks for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from nucleate.checkpoint.readers.torch.pickled import EndOfPickleError, Unpickler
from nucleate.checkpoint.readers.torch.torch_pickle import PickledTensor, StorageRef, find, storage_of
from nucleate.checkpoint.readers.torch.zip_directory import ZipDirectory, ZipEntry
from nucleate.checkpoint.stored.data_file import Bytes, HeldBytes
from nucleate.checkpoint.stored.tensor import Chunk, StoredTensor
from nucleate.errors import CheckpointError

# The number at the start of files from before torch 1.6, as a pickle (torch/serialization.py, MAGIC_NUMBER).
_MAGIC = 0x1950A86A20F9469CFC6C


class TorchArchive(ABC):
    """An archive.

    Attributes:
        value: The saved value, with a `PickledTensor` for each tensor.
        file: The file that holds the archive.
    """

    value: Any
    file: Bytes

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
        chunk = Chunk(self.file, offset, (0,) * len(tensor.shape), tensor.shape, stride)
        stored = StoredTensor(key, tensor.dtype, tensor.shape, (chunk,))
        if (tensor.is_conjugate or tensor.is_negative) and 0 not in tensor.shape:
            # torch marked the tensor instead of computing it. Compute all stored elements, as the tensor may have gaps.
            extent = chunk.extent_bytes(tensor.dtype)
            numbers = torch.empty(extent // tensor.dtype.itemsize, dtype=tensor.dtype, device="cpu")
            self.file.read_into(numbers.data_ptr(), extent, offset)
            numbers = numbers.conj().resolve_conj() if tensor.is_conjugate else numbers
            numbers = -numbers if tensor.is_negative else numbers
            held = Chunk(HeldBytes(self.file.name, numbers), 0, chunk.begin, chunk.shape, stride)
            stored = StoredTensor(key, tensor.dtype, tensor.shape, (held,))
        return stored

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
        self._begin = begin
        size_bytes = file.size_bytes - begin if size_bytes is None else size_bytes
        self._directory = ZipDirectory(lambda offset, size: file.read(begin + offset, size), size_bytes, file.name)
        self._prefix = prefix_of(self._directory, file.name)
        self._records: dict[str, ZipEntry] = {}
        data = self._bytes("data.pkl")
        if f"{self._prefix}byteorder" in self._directory and self._bytes("byteorder") != b"little":
            raise CheckpointError(
                f"{file.name} was written on a big-endian machine. Load it with `torch.load` and save it again."
            )
        self.value = Unpickler(data, find, self._storage, name=file.name).load()

    def record(self, key: str) -> tuple[int, int]:
        if key not in self._records:
            self._records[key] = self._directory.record(f"{self._prefix}data/{key}")
        found = self._records[key]
        return self._begin + found.offset, found.size_bytes

    def _bytes(self, name: str) -> bytes:
        record = self._directory.record(f"{self._prefix}{name}")
        return self.file.read(self._begin + record.offset, record.size_bytes)

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
        length = min(1 << 16, file.size_bytes)
        while True:
            try:
                keys, position = self._read_pickles(file.read(0, length))
                break
            except EndOfPickleError:
                if length == file.size_bytes:
                    raise
                length = min(8 * length, file.size_bytes)
        self._places = self._read_places(keys, position)

    def record(self, key: str) -> tuple[int, int]:
        if key not in self._places:
            raise CheckpointError(f"{self.file.name} is damaged: it has no storage {key}. Copy it again.")
        return self._places[key]

    def _read_pickles(self, data: bytes) -> tuple[list[Any], int]:
        self._storages.clear()
        position = 0
        found = []
        for _ in range(5):
            unpickler = Unpickler(data, find, self._storage, name=self.file.name, start=position)
            found.append(unpickler.load())
            position = unpickler.position
        _, version, system, self.value, keys = found
        if version != 1001 or not isinstance(system, dict) or not isinstance(keys, list):
            raise CheckpointError(f"{self.file.name} is damaged: it is not a file of version 1001. Copy it again.")
        if system.get("little_endian") is not True:
            raise CheckpointError(
                f"{self.file.name} was written on a big-endian machine. Load it with `torch.load` and save it again."
            )
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
    start = file.read(0, min(64, file.size_bytes))
    if not start:
        raise CheckpointError(f"{file.name} is empty. Copy it again.")
    if is_legacy(start):
        return LegacyTorchArchive(file)
    if start.startswith(b"PK"):
        return ZipTorchArchive(file)
    if start[:1] == b"\x80":
        raise CheckpointError(
            f"{file.name} is a pickle that `torch.save` did not write. Loading it would run the code that it names. If "
            "you trust it, load it with `pickle` and save a state dict of tensors with `torch.save`."
        )
    raise CheckpointError(
        f"{file.name} is not a file of `torch.save`: it begins with {start[:8]!r}. It is damaged or of another format; "
        "copy it again, or give the name of its reader."
    )


def is_legacy(start: bytes) -> bool:
    """Return whether a file that begins with `start` has the format from before torch 1.6."""
    return start[:1] == b"\x80" and _MAGIC.to_bytes(10, "little") in start[:40]


def prefix_of(directory: ZipDirectory, name: str) -> str:
    """Return the prefix of the names of all records.

    Raises:
        CheckpointError: `torch.save` did not make the archive.
    """
    found = [record for record in directory.names() if record.endswith("data.pkl") and record.count("/") <= 1]
    if len(found) != 1 or found[0].rpartition("/")[2] != "data.pkl":
        raise directory.damaged("it is a zip archive, but not a file of `torch.save`: it has no data.pkl")
    prefix = found[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in directory:
        raise CheckpointError(
            f"{name} is a TorchScript program, not a checkpoint. Save `torch.jit.load(path).state_dict()` instead."
        )
    return prefix


def lies_row_by_row(tensor: PickledTensor) -> bool:
    """Return whether the elements of a tensor follow one another in the order of their indices."""
    expected = 1
    for length, step in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if length != 1 and step != expected:
            return 0 in tensor.shape
        expected *= length
    return True
