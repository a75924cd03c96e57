"""The elements of a real tensor, by reference: a state dict's tensor as the source of a deferred parameter.

Nothing is copied before the parameter is made. So the tensor must still hold the same values then. Its version counter
tells of a write; for a tensor in the pages of a file, the file is watched as well.
"""

from __future__ import annotations

import ctypes
import hashlib
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

#: Of a mapped file, so many windows of so many elements tell ranks whether they have the same one.
_NUM_WINDOWS = 8
_WINDOW_NUMEL = 256

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
        # The user's tensor tells of writes by its version. An alias keeps the memory, whatever becomes of the tensor.
        self._tensor: Tensor | None = tensor
        self._version = _version(tensor)
        self._number = next(_numbers)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            alias = tensor.detach()
            on_cpu = alias.device.type == "cpu" and not (alias.is_conj() or alias.is_neg())
            self._is_plain = on_cpu and alias.is_contiguous()
            # Memory that torch may resize is its own.
            foreign = self._is_plain and alias.numel() > 0 and not alias.untyped_storage().resizable()
            size_bytes = alias.numel() * alias.element_size()
            self._place = place_of(alias.data_ptr(), size_bytes, alias) if foreign else None
        self._alias = alias
        self._size_bytes = alias.untyped_storage().nbytes()
        # Writes through `.data` or by NumPy move no version.
        self._sum = self._sum_of_words() if self._place is None else 0

    @property
    def is_mapped(self) -> bool:
        """Whether the elements lie in the pages of a file."""
        return self._place is not None

    def keep_copy(self) -> None:
        """Keep a copy from here on, because the tensor is about to be written."""
        if self._tensor is not None and _version(self._tensor) == self._version:
            with torch.no_grad():
                self._alias = self._alias.clone(memory_format=torch.contiguous_format)
            # Nobody else has it.
            self._tensor = None
            self._size_bytes = self._alias.untyped_storage().nbytes()
            self._is_plain = self._alias.device.type == "cpu"
            self._place = None

    def check_unchanged(self) -> None:
        if self._place is not None:
            self._place.mark.check()
        changed = self._tensor is not None and _version(self._tensor) != self._version
        changed = changed or self._alias.untyped_storage().nbytes() != self._size_bytes
        if changed or (self._tensor is not None and self._place is None and self._sum_of_words() != self._sum):
            raise DeferredEditError(f"a loaded tensor of shape {self.shape} was changed in place")

    def _sum_of_words(self) -> int:
        if not self._is_plain:
            return 0
        with torch._C.DisableTorchFunction(), torch.no_grad():
            words = self._alias.view(-1).view(torch.uint8)
            if words.numel() % 8 or words.storage_offset() % 8:
                return int(words.sum())
            return int(words.view(torch.int64).sum())

    def resident(self, device: torch.device) -> Tensor | None:
        if self._alias.device.type != device.type:
            return None
        self._refuse_lost()
        return self._alias

    def read(self, start: int, out: Tensor) -> None:
        self._refuse_lost()
        if self._is_plain:
            size = self.dtype.itemsize
            ctypes.memmove(out.data_ptr(), self._alias.data_ptr() + start * size, out.numel() * size)
            return
        with torch._C.DisableTorchFunction(), torch.no_grad():
            # A dim of one element in front would make one row of all.
            _read_rows(self._alias.squeeze(), start, out)

    def _refuse_lost(self) -> None:
        if self._alias.untyped_storage().nbytes() != self._size_bytes:
            raise DeferredEditError(f"a loaded tensor of shape {self.shape} has lost its memory since it was loaded.")

    def order(self, start: int) -> tuple[int, int]:
        if self._place is None:
            return (self._number, start)
        return (self._place.mark.inode, self._place.offset + start * self.dtype.itemsize)

    def describe(self) -> str:
        numel = math.prod(self.shape)
        digest = hashlib.blake2b(digest_size=16)
        if self._place is None:
            for first in range(0, numel, _CHUNK_NUMEL):
                part = torch.empty(min(_CHUNK_NUMEL, numel - first), dtype=self.dtype, device="cpu")
                self.read(first, part)
                digest.update(repr(_sums(part)).encode())
        else:
            # As ranks see one file, wherever each finds it. Some windows tell another file of that name and size.
            digest.update(repr((Path(self._place.mark.path).name, self._place.offset)).encode())
            for first in range(0, numel, max(_WINDOW_NUMEL, numel // _NUM_WINDOWS)):
                part = torch.empty(min(_WINDOW_NUMEL, numel - first), dtype=self.dtype, device="cpu")
                self.read(first, part)
                digest.update(ctypes.string_at(part.data_ptr(), part.numel() * part.element_size()))
        return repr((self.dtype, self.shape, digest.hexdigest()))


def _sums(part: Tensor) -> tuple[int, int]:
    """Return two sums over the words of some elements; the second one depends on their order."""
    words = part.view(torch.uint8)
    words = words.view(torch.int64) if words.numel() % 8 == 0 else words.to(torch.int64)
    places = torch.arange(1, 1 + words.numel(), device=words.device)
    return int(words.sum()), int((words * places).sum())


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
