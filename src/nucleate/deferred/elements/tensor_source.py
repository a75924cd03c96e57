"""Tensor sources: a real tensor, such as one of a state dict, as the element source of a deferred parameter.

Nothing is copied before the parameter is made, so the tensor must still hold the same values then. The tensor's version
counter shows most writes, and a sum of its memory shows the others. For a tensor in the pages of a file, the file is
watched.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from contextlib import nullcontext, suppress
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from nucleate.deferred.elements.element_source import ElementSource
from nucleate.deferred.elements.mapped_files import FileMark, place_of
from nucleate.deferred.torch_modes import plain_modes
from nucleate.devices import hooks_of, slabs
from nucleate.errors import DeferredEditError

#: Elements that are copied at a time from a tensor that does not lie row by row or is on another device.
_CHUNK_NUMEL = 1 << 18

#: Ranks compare this many windows of this many elements to see whether they have the same mapped file.
_NUM_WINDOWS = 8
_WINDOW_NUMEL = 256

#: The integer dtype for each size of an element in bytes.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_numbers = count(1 << 32)


class TensorSource(ElementSource):
    """The elements of a real tensor, which is kept and read on demand.

    Args:
        tensor: A strided tensor with memory, of any device and strides.
    """

    def __init__(self, tensor: Tensor) -> None:
        assert not tensor.is_meta
        assert tensor.layout == torch.strided
        self.dtype = tensor.dtype
        self.shape = tuple(tensor.shape)
        # The version of the user's tensor shows writes. An alias keeps the memory, whatever happens to the tensor.
        self._tensor: Tensor | None = tensor
        self._version = _version(tensor)
        self._number = next(_numbers)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            alias = tensor.detach()
            on_cpu = alias.device.type == "cpu"
            self._is_plain = on_cpu and alias.is_contiguous() and not (alias.is_conj() or alias.is_neg())
            # Memory that torch may resize belongs to torch, not to a file.
            foreign = on_cpu and alias.numel() > 0 and not alias.untyped_storage().resizable()
            place = place_of(alias.data_ptr(), _extent(alias) * alias.element_size(), alias) if foreign else None
        self._place = place if self._is_plain else None
        self._mark: FileMark | None = place.mark if place is not None else None
        self._alias = alias
        self._size_bytes = alias.untyped_storage().nbytes()
        # Writes through `.data` or by NumPy do not change the version.
        self._sum = _sum_of_words(alias) if self._mark is None else 0

    @property
    def is_mapped(self) -> bool:
        """Whether the elements lie in the pages of a file."""
        return self._place is not None

    def keep_copy(self) -> None:
        """Keep a copy from now on, because the tensor is about to be written."""
        if self._tensor is not None and _version(self._tensor) == self._version:
            with torch.no_grad():
                self._alias = self._alias.clone(memory_format=torch.contiguous_format)
            # Nobody else has the copy, so there is nothing to watch.
            self._tensor = None
            self._size_bytes = self._alias.untyped_storage().nbytes()
            self._is_plain = self._alias.device.type == "cpu"
            self._place = self._mark = None

    def check_unchanged(self) -> None:
        if self._mark is not None:
            self._mark.check()
        changed = self._tensor is not None and _version(self._tensor) != self._version
        changed = changed or self._alias.untyped_storage().nbytes() != self._size_bytes
        if changed or (self._tensor is not None and self._mark is None and _sum_of_words(self._alias) != self._sum):
            raise DeferredEditError(f"a loaded tensor of shape {self.shape} was changed in place")

    def resident(self, device: torch.device) -> Tensor | None:
        if self._alias.device.type != device.type:
            return None
        self._refuse_lost()
        _keep_for_current_stream(self._alias)
        return self._alias

    def read(self, start: int, out: Tensor) -> None:
        self._refuse_lost()
        if self._is_plain:
            size = self.dtype.itemsize
            ctypes.memmove(out.data_ptr(), self._alias.data_ptr() + start * size, out.numel() * size)
            return
        with torch._C.DisableTorchFunction(), torch.no_grad():
            # A leading dim of size 1 would make one row of all elements.
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
            # Without the folder, since ranks may see one file at different paths. A few windows of elements show
            # whether it is another file with this name and size.
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
    # Long rows are read one at a time, part by part.
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


def _extent(tensor: Tensor) -> int:
    """Return the number of elements in memory from the first to the last one, including both."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _sum_of_words(tensor: Tensor) -> int:
    """Return the sum of a tensor's memory as integers, computed on its device. It is exact in any order of addition."""
    if not tensor.numel():
        return 0
    # While a recording is on, it would also record computations on a device's tensors.
    modes = plain_modes() if tensor.device.type != "cpu" else nullcontext()
    with torch._C.DisableTorchFunction(), torch.no_grad(), modes:
        memory = tensor.conj() if tensor.is_conj() else tensor
        memory = torch._neg_view(memory) if memory.is_neg() else memory
        if not memory.is_contiguous():
            # View the elements in the order in which they lie in memory, each once.
            dims = sorted(zip(memory.stride(), memory.shape, strict=True), reverse=True)
            dims = [(stride, size) for stride, size in dims if stride and size > 1]
            memory = memory.as_strided([size for _, size in dims], [stride for stride, _ in dims])
        if not memory.is_contiguous():
            memory = torch.view_as_real(memory) if memory.is_complex() else memory
            words = memory.view(_WORDS[memory.element_size()])
            return int(torch.stack([part.sum(dtype=torch.int64) for _, part in slabs(words, _CHUNK_NUMEL)]).sum())
        octets = memory.view(-1).view(torch.uint8)
        head = min(-octets.storage_offset() % 8, octets.numel())
        stop = octets.numel() - (octets.numel() - head) % 8
        rests = [octets[first:last] for first, last in ((0, head), (stop, octets.numel())) if first < last]
        words = octets[head:stop] if rests else octets
        # Only one number is read back, even from a device.
        return int(sum((rest.sum() for rest in rests), words.view(torch.int64).sum()))


def _keep_for_current_stream(tensor: Tensor) -> None:
    """Keep the memory of the tensor, once freed, until the work that the current stream then has is done."""
    if tensor.device.type == "cpu":
        return
    with plain_modes(), suppress(RuntimeError):  # NotImplementedError of a device without streams is one.
        tensor.record_stream(hooks_of(tensor.device).current_stream(tensor.device))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
