"""A data file of a torch.distributed.checkpoint folder: one tensor after another, each in its own archive.

Finding thousands of tensors must not take long. So this module reads only the two ends of an archive, and parses the
pickle of each shape once.
"""

from __future__ import annotations

from typing import Any

import torch

from nucleate.checkpoint.readers.safetensors_file import SafetensorsFile
from nucleate.checkpoint.readers.torch.pickled import Unpickler
from nucleate.checkpoint.readers.torch.torch_archive import TorchArchive, ZipTorchArchive, lies_row_by_row, prefix_of
from nucleate.checkpoint.readers.torch.torch_pickle import PickledTensor, StorageRef, find, storage_of
from nucleate.checkpoint.readers.torch.zip_directory import ZipDirectory
from nucleate.checkpoint.stored.data_file import DataFile
from nucleate.errors import CheckpointError

# Enough for the records that torch writes before and after the numbers of one tensor.
_HEAD_BYTES = 2048
_TAIL_BYTES = 2048


class BlobFile:
    """A data file, and the places where the numbers of its tensors begin.

    Attributes:
        file: The file itself.
    """

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self._values: dict[bytes, Any] = {}
        self._safetensors: dict[int, SafetensorsFile] = {}

    def place(
        self, key: str, dtype: torch.dtype, shape: tuple[int, ...], offset: int, size_bytes: int
    ) -> tuple[int, tuple[int, ...] | None]:
        """Return where the numbers of a tensor begin in the file, and their strides if they do not lie row by row.

        Args:
            key: The tensor's key.
            dtype: The tensor's dtype according to the index.
            shape: The tensor's shape according to the index.
            offset: The place where the tensor's archive begins.
            size_bytes: The length of the archive.

        Raises:
            CheckpointError: The file holds something else at this place, or is cut short.
        """
        self.check_range(key, offset, size_bytes)
        head = self.file.read(offset, min(size_bytes, _HEAD_BYTES))
        if head[:2] != b"PK" and self.file.read(offset, min(9, self.file.size_bytes - offset))[8:] == b"{":
            return self._place_in_safetensors(key, dtype, shape, offset)
        try:
            return self._place_in_archive(key, dtype, shape, head, offset, size_bytes)
        except CheckpointError as error:
            raise CheckpointError(f"{key} at bytes {offset} to {offset + size_bytes}: {error}") from error

    def check_range(self, key: str, offset: int, size_bytes: int) -> None:
        """Make sure that the file is long enough for the archive of a tensor. This method reads nothing.

        Raises:
            CheckpointError: The file is too short.
        """
        if offset + size_bytes > self.file.size_bytes:
            raise CheckpointError(
                f"{key} lies at bytes {offset} to {offset + size_bytes} of {self.file.name}, which has "
                f"{self.file.size_bytes} bytes: the file is damaged or was cut short. Copy it again."
            )

    def archive(self, offset: int, size_bytes: int) -> TorchArchive:
        """Return the archive at some place in the file.

        Raises:
            CheckpointError: The archive is damaged, or the bytes are not an archive.
        """
        return ZipTorchArchive(self.file, offset, size_bytes)

    def _place_in_archive(
        self, key: str, dtype: torch.dtype, shape: tuple[int, ...], head: bytes, offset: int, size_bytes: int
    ) -> tuple[int, tuple[int, ...] | None]:
        tail_begin = max(0, size_bytes - _TAIL_BYTES)
        tail = self.file.read(offset + tail_begin, size_bytes - tail_begin) if len(head) < size_bytes else head

        def read(begin: int, length: int) -> bytes:
            if begin + length <= len(head):
                return head[begin : begin + length]
            if begin >= tail_begin:
                return tail[begin - tail_begin : begin - tail_begin + length]
            return self.file.read(offset + begin, length)

        directory = ZipDirectory(read, size_bytes, self.file.name)
        prefix = prefix_of(directory, self.file.name)
        if f"{prefix}byteorder" in directory:
            record = directory.record(f"{prefix}byteorder")
            if read(record.offset, record.size_bytes) != b"little":
                raise CheckpointError(f"{self.file.name} was written on a big-endian machine, whose numbers differ.")
        record = directory.record(f"{prefix}data.pkl")
        pickled = read(record.offset, record.size_bytes)
        if pickled not in self._values:
            self._values[pickled] = Unpickler(pickled, find, _storage, name=self.file.name).load()
        tensor = self._values[pickled]
        if not isinstance(tensor, PickledTensor) or tensor.dtype is not dtype or tensor.shape != shape:
            found = (
                f"{tensor.dtype} of shape {tensor.shape}" if isinstance(tensor, PickledTensor) else "not a plain tensor"
            )
            raise CheckpointError(
                f"{key} is {dtype} of shape {shape} according to the index, but {found} in {self.file.name}. The files "
                "do not belong together, or are damaged."
            )
        if tensor.is_conjugate or tensor.is_negative:
            raise CheckpointError(
                f"{key} was saved as a conjugate that was never computed. Save `tensor.resolve_conj()`."
            )
        record = directory.record(f"{prefix}data/{tensor.storage.key}")
        if record.size_bytes < tensor.storage.size_bytes:
            raise directory.damaged(f"{key} has {record.size_bytes} bytes instead of {tensor.storage.size_bytes}")
        begin = offset + record.offset + tensor.offset * dtype.itemsize
        return begin, None if lies_row_by_row(tensor) else tensor.stride

    def _place_in_safetensors(
        self, key: str, dtype: torch.dtype, shape: tuple[int, ...], offset: int
    ) -> tuple[int, tuple[int, ...] | None]:
        """Find a tensor in a file that DCP wrote with `SerializationFormat.SAFETENSORS`."""
        if offset not in self._safetensors:
            self._safetensors[offset] = SafetensorsFile.read(self.file, offset)
        stored = self._safetensors[offset].tensors.get(key)
        if stored is None or stored.dtype is not dtype or stored.shape != shape:
            found = "nothing" if stored is None else f"{stored.dtype} of shape {stored.shape}"
            raise CheckpointError(
                f"{key} is {dtype} of shape {shape} according to the index, but {self.file.name} holds {found} under "
                "that name."
            )
        return stored.chunks[0].offset, None


def _storage(persistent_id: Any) -> StorageRef:
    return storage_of(persistent_id)
