"""Tensors in a file's own pages: they are ready at once, and take no memory until somebody writes to them.

The pages are mapped copy-on-write, so a write to a tensor never changes the file. But nobody may change or cut short
the file as long as a tensor lies in it. If the file is cut short, the next access kills the process.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import torch
from torch import Tensor

from nucleate.checkpoint.stored.data_file import DataFile
from nucleate.checkpoint.stored.read_ahead import ReadAhead
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.deferred import ElementSource
from nucleate.errors import CheckpointError


class Mapper:
    """The mapped files, each mapped once."""

    def __init__(self) -> None:
        self._mapped: dict[int, torch.UntypedStorage] = {}
        self._ahead = ReadAhead()
        # The first byte of each tensor that was handed out and the byte behind its last, by file, in ascending order.
        self._taken: dict[int, list[tuple[int, int]]] = {}

    def given(self, stored: StoredTensor) -> ElementSource:
        """Return the element source of a stored tensor, whose pages may become a tensor's memory if they fit.

        A tensor is read instead if it lies in several chunks, not in the order of its elements, or at an address that
        its dtype cannot have. It is also read if another tensor already has its bytes, because mapping would tie both.
        """
        chunk = stored.chunks[0] if stored.is_plain else None
        if chunk is None or not isinstance(chunk.file, DataFile) or chunk.offset % stored.dtype.itemsize:
            return stored
        taken = self._taken.setdefault(chunk.file.number, [])
        span = (chunk.offset, chunk.offset + stored.size_bytes)
        place = bisect_right(taken, span)
        if (place and taken[place - 1][1] > span[0]) or (place < len(taken) and taken[place][0] < span[1]):
            return stored
        taken.insert(place, span)
        return MappedTensor(stored, self)

    def storage(self, file: DataFile) -> torch.UntypedStorage:
        """Return a whole file as a storage.

        Raises:
            CheckpointError: The file was removed or replaced, has another length, or cannot be mapped.
        """
        if file.number not in self._mapped:
            file.check_unchanged()
            try:
                mapped: Any = torch.UntypedStorage.from_file(file.name, False, file.size_bytes)
            except RuntimeError as error:
                raise CheckpointError(f"{file.name} cannot be mapped: {error}. Load it with mmap=False.") from error
            self._mapped[file.number] = mapped
            file.read_ahead(self._ahead)
        return self._mapped[file.number]


class MappedTensor(ElementSource):
    """A stored tensor whose file's pages may become the memory of a tensor.

    Args:
        stored: The stored tensor.
        mapper: The object that maps the tensor's file.
    """

    def __init__(self, stored: StoredTensor, mapper: Mapper) -> None:
        self.dtype = stored.dtype
        self.shape = stored.shape
        self._stored = stored
        self._mapper = mapper
        self._is_taken = False

    def read(self, start: int, out: Tensor) -> None:
        self._stored.read(start, out)

    def order(self, start: int) -> tuple[int, int]:
        return self._stored.order(start)

    def expect(self, numel: int) -> None:
        self._stored.expect(numel)

    def is_far(self) -> bool:
        return self._stored.is_far()

    def check_unchanged(self) -> None:
        self._stored.check_unchanged()

    def describe(self) -> str:
        return self._stored.describe()

    def memory(self) -> torch.UntypedStorage | None:
        if self._is_taken:
            # A copy of the tensor asks for memory. The copy must not be tied to the tensor.
            return None
        self._is_taken = True
        chunk = self._stored.chunks[0]
        assert isinstance(chunk.file, DataFile)
        whole: Any = self._mapper.storage(chunk.file)
        part: torch.UntypedStorage = whole[chunk.offset : chunk.offset + self._stored.size_bytes]
        return part
