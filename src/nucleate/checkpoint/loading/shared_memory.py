"""Memory that tensors of a torch file share: if their bytes overlap in the file, they overlap again when loaded.

`torch.save` writes the memory of tied tensors and of views once, and `torch.load` gives it to all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nucleate.checkpoint.stored.data_file import Bytes
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.deferred import is_recording


@dataclass(eq=False)
class _Range:
    """A range of a file that several tensors lie in.

    Attributes:
        file: The file.
        begin: The first byte.
        end: The byte after the last one.
        num_tensors: The number of different tensors in it.
        data: The bytes, when somebody has asked for a tensor in it.
    """

    file: Bytes
    begin: int
    end: int
    num_tensors: int = 1
    data: Tensor | None = None


class SharedMemory:
    """The memory of the tensors of one checkpoint. Each range of a file has its memory once.

    Args:
        tensors: The tensors of the checkpoint.
    """

    def __init__(self, tensors: Iterable[StoredTensor]) -> None:
        self._made: dict[object, Tensor] = {}
        self._ranges: dict[object, _Range] = {}
        distinct = {stored.identity: stored for stored in tensors if len(stored.chunks) == 1 and stored.numel}
        last: _Range | None = None
        for stored in sorted(distinct.values(), key=lambda one: (one.chunks[0].file.number, one.chunks[0].offset)):
            (chunk,) = stored.chunks
            end = chunk.offset + chunk.extent_bytes(stored.dtype)
            if last is not None and last.file is chunk.file and chunk.offset < last.end:
                last.end, last.num_tensors = max(last.end, end), last.num_tensors + 1
            else:
                last = _Range(chunk.file, chunk.offset, end)
            self._ranges[stored.identity] = last

    def tensor(self, stored: StoredTensor, read: Callable[[StoredTensor, Tensor], None]) -> Tensor:
        """Return a tensor on the CPU that is going to be filled; the same one for the same stored tensor.

        Args:
            stored: The stored tensor.
            read: Called with a stored tensor and a new tensor that is to be filled from it.
        """
        if stored.identity not in self._made:
            self._made[stored.identity] = self._new(stored, read)
        return self._made[stored.identity]

    def _new(self, stored: StoredTensor, read: Callable[[StoredTensor, Tensor], None]) -> Tensor:
        range_ = self._ranges.get(stored.identity)
        begin = 0 if range_ is None else stored.chunks[0].offset - range_.begin
        # Deferred tensors have no memory to share.
        is_alone = range_ is None or range_.num_tensors == 1 or is_recording()
        if range_ is None or is_alone or begin % stored.dtype.itemsize:
            made = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
            read(stored, made)
            return made
        if range_.data is None:
            size_bytes = range_.end - range_.begin
            range_.data = torch.empty(size_bytes, dtype=torch.uint8, device="cpu")
            name = f"bytes {range_.begin} to {range_.end} of {range_.file.name}"
            whole = StoredTensor.whole(name, torch.uint8, (size_bytes,), range_.file, range_.begin)
            read(whole, range_.data)
        stride = stored.chunks[0].stride or torch.empty(stored.shape, device="meta").stride()
        view = torch.empty(0, dtype=stored.dtype, device="cpu")
        return view.set_(range_.data.untyped_storage(), begin // stored.dtype.itemsize, stored.shape, stride)
