"""The elements of a real tensor, by reference: a state dict's tensor as the source of a deferred parameter.

Nothing is copied before the parameter is made. So the tensor must still hold the same values then. Its version counter
tells of a write; for a tensor in the pages of a file, the file is watched as well.
"""

from __future__ import annotations

import ctypes
import math
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from nucleate.deferred.given import Given
from nucleate.deferred.mapped_files import place_of
from nucleate.errors import DeferredEditError

#: Elements of a tensor that does not lie row by row, or on another device, that are copied at a time.
_CHUNK_NUMEL = 1 << 18

_numbers = count(1 << 32)


class TensorGiven(Given):
    """The elements of a real tensor, which is kept and read when they are wanted.

    Args:
        tensor: A strided tensor with memory, of any device and strides.
    """

    def __init__(self, tensor: Tensor) -> None:
        assert not tensor.is_meta
        assert tensor.layout == torch.strided
        self.dtype = tensor.dtype
        self.shape = tuple(tensor.shape)
        self._tensor = tensor
        self._version = _version(tensor)
        self._number = next(_numbers)
        with torch._C.DisableTorchFunction():
            on_cpu = tensor.device.type == "cpu" and not (tensor.is_conj() or tensor.is_neg())
            self._is_plain = on_cpu and tensor.is_contiguous()
            # Memory that torch may resize is its own.
            foreign = self._is_plain and tensor.numel() > 0 and not tensor.untyped_storage().resizable()
            size_bytes = tensor.numel() * tensor.element_size()
            self._place = place_of(tensor.data_ptr(), size_bytes, self) if foreign else None

    @property
    def is_mapped(self) -> bool:
        """Whether the elements lie in the pages of a file."""
        return self._place is not None

    def keep_copy(self) -> None:
        """Keep a copy from here on, because the tensor is about to be written."""
        if _version(self._tensor) == self._version:
            with torch.no_grad():
                self._tensor = self._tensor.detach().clone(memory_format=torch.contiguous_format)
            self._version = _version(self._tensor)
            self._is_plain = self._tensor.device.type == "cpu"
            self._place = None

    def check_unchanged(self) -> None:
        if _version(self._tensor) != self._version:
            raise DeferredEditError(f"the tensor of shape {self.shape} that was loaded into it was changed in place")
        if self._place is not None:
            self._place.mark.check()

    def read(self, start: int, out: Tensor) -> None:
        if self._is_plain:
            size = self.dtype.itemsize
            ctypes.memmove(out.data_ptr(), self._tensor.data_ptr() + start * size, out.numel() * size)
            return
        with torch._C.DisableTorchFunction(), torch.no_grad():
            # A dim of one element in front would make one row of all.
            _read_rows(self._tensor.detach().squeeze(), start, out)

    def order(self, start: int) -> tuple[int, int]:
        if self._place is None:
            return (self._number, start)
        return (self._place.mark.identity[1], self._place.offset + start * self.dtype.itemsize)

    def describe(self) -> str:
        if self._place is not None:
            # As ranks see one file, wherever each finds it.
            name, size_bytes = Path(self._place.mark.path).name, self._place.mark.identity[2]
            return repr((name, size_bytes, self._place.offset, self.dtype, self.shape))
        return repr((self.dtype, self.shape, *self._sums()))

    def _sums(self) -> tuple[int, int]:
        """Return two sums over the words of all elements, which differ where the elements do."""
        total = alternate = 0
        numel = math.prod(self.shape)
        buffer = torch.empty(min(_CHUNK_NUMEL, numel), dtype=self.dtype, device="cpu")
        for first in range(0, numel, _CHUNK_NUMEL):
            part = buffer[: numel - first]
            self.read(first, part)
            words = part.view(torch.uint8)
            words = words.view(torch.int64) if words.numel() % 8 == 0 else words
            total, alternate = total + int(words.sum()), alternate + int(words[::2].sum())
        return total, alternate


def _read_rows(tensor: Tensor, start: int, out: Tensor) -> None:
    rows = tensor if tensor.dim() else tensor.view(1)
    row_numel = math.prod(rows.shape[1:])
    stop = start + out.numel()
    # Rows that are long themselves are read one at a time, part by part.
    step = max(1, _CHUNK_NUMEL // row_numel)
    for first in range(start // row_numel, -(-stop // row_numel), step):
        begin = first * row_numel
        low, high = max(start, begin), min(stop, begin + step * row_numel)
        part = out[low - start : high - start]
        if row_numel > _CHUNK_NUMEL:
            _read_rows(rows[first], low - begin, part)
        else:
            held = rows[first : first + step].reshape(-1).cpu()
            part.copy_(held[low - begin : high - begin])


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
