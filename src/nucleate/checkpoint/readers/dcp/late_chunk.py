"""Chunks of a large DCP folder. The place of their numbers is found when somebody reads them, not when it is opened.

Each chunk lies in an archive of its own, so finding all places takes two reads for each of up to millions of chunks. A
rank reads only a few of them.
"""

from __future__ import annotations

from typing import Any, final

import torch

from nucleate.checkpoint.readers.dcp.blobs import BlobFile
from nucleate.checkpoint.readers.dcp.dcp_metadata import DCPChunk
from nucleate.checkpoint.stored.chunk import Chunk
from nucleate.errors import CheckpointError, CheckpointUnreadableError, shortened

_MAX_MESSAGE = 900

# Attributes of frozen objects are set by this function.
_set = object.__setattr__


@final
class LateChunk(Chunk):
    """A chunk that looks for its numbers when somebody asks for `offset` or `stride`, and remembers them.

    Any number of threads may ask. They may all look at the same time, and then find the same.

    Args:
        key: The tensor's key.
        dtype: The tensor's dtype.
        part: The chunk as the index describes it.
        blobs: The file that it lies in.
    """

    __slots__ = ("_blobs", "_dtype", "_found", "_key", "_part")

    _key: str
    _dtype: torch.dtype
    _part: DCPChunk
    _blobs: BlobFile
    _found: tuple[int, tuple[int, ...] | None] | None

    def __init__(self, key: str, dtype: torch.dtype, part: DCPChunk, blobs: BlobFile) -> None:
        _set(self, "file", blobs.file)
        _set(self, "begin", part.begin)
        _set(self, "shape", part.shape)
        _set(self, "_key", key)
        _set(self, "_dtype", dtype)
        _set(self, "_part", part)
        _set(self, "_blobs", blobs)
        _set(self, "_found", None)

    @property
    def offset(self) -> int:
        """The place of its first element in the file, in bytes.

        Raises:
            CheckpointError: The file holds something else at this place, or the disk fails.
        """
        return self._place()[0]

    @property
    def stride(self) -> tuple[int, ...] | None:
        """Its strides in elements, if it does not lie row by row.

        Raises:
            CheckpointError: See `offset`.
        """
        return self._place()[1]

    @property
    def mark(self) -> int:
        return self._part.blob.offset

    def check_place(self, key: str, dtype: torch.dtype) -> None:
        """Make sure that its archive lies within the file; `locate` checks the numbers in it."""
        blob = self._part.blob
        self._blobs.check_range(key, blob.offset, blob.size_bytes)

    def locate(self) -> None:
        self._place()

    def describe(self) -> tuple[Any, ...]:
        return (self._part.blob, self.begin, self.shape)

    def _place(self) -> tuple[int, tuple[int, ...] | None]:
        if self._found is None:
            try:
                _set(self, "_found", self._find())
            except CheckpointError as error:
                # A key in the index may be of any length.
                raise type(error)(shortened(str(error), _MAX_MESSAGE)) from error
            except (MemoryError, RecursionError) as error:
                raise CheckpointUnreadableError(
                    f"{self.file.name} cannot be read: it asks for too much ({type(error).__name__}). It is damaged, "
                    "or made to harm."
                ) from error
        assert self._found is not None
        return self._found

    def _find(self) -> tuple[int, tuple[int, ...] | None]:
        blob = self._part.blob
        offset, stride = self._blobs.place(self._key, self._dtype, self.shape, blob.offset, blob.size_bytes)
        Chunk(self.file, offset, self.begin, self.shape, stride).check_place(self._key, self._dtype)
        return offset, stride

    # A file in the format of safetensors holds several tensors, so the key belongs to the place.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LateChunk):
            return NotImplemented
        return self is other or (self.file is other.file and (self._key, self._part) == (other._key, other._part))

    def __hash__(self) -> int:
        return hash((self.file.number, self._key, self._part.blob.offset))

    def __repr__(self) -> str:
        return f"LateChunk({self._key!r}, {self._dtype}, {self._part}, {self.file!r})"
