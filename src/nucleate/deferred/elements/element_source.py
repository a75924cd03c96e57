"""Element sources: values of a deferred tensor that come from outside of its recipe, such as from a file.

`bind` records that an element source overwrites a tensor. That is one step on the tape like any other. So later casts,
ties, copies and edits of the tensor need no special case. The tensor's earlier value is dead and is never made. A rank
that keeps a part of the tensor reads only that part.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nucleate.devices import Staging, casts_there, slabs

#: Elements that are cast at a time: torch does not split the work over threads of its own (`at::internal::GRAIN_SIZE`).
_CAST_NUMEL = 1 << 15
#: Elements that are read at a time through a buffer.
_BUFFER_NUMEL = 1 << 18
# Each thread keeps its buffers: else the system would have to find and clear new memory for every tensor.
_kept = threading.local()


class ElementSource(ABC):
    """The elements of a tensor that can be read in ranges, from any thread.

    Attributes:
        dtype: Their dtype.
        shape: The tensor's shape.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @abstractmethod
    def read(self, start: int, out: Tensor) -> None:
        """Read a range of the elements, in the order of their indices.

        Args:
            start: The first element.
            out: The memory to fill, as long as the range: one-dimensional, contiguous, on the CPU and of this dtype.
        """

    @abstractmethod
    def order(self, start: int) -> tuple[int, int]:
        """Return the sort key of a range that begins at `start`; reading in the order of the keys is fastest."""

    @abstractmethod
    def describe(self) -> str:
        """Return a text that is equal on ranks with the same elements, and differs on other ranks."""

    def memory(self) -> torch.UntypedStorage | None:
        """Return memory that already holds the elements and may become the tensor's own, or None."""
        return None

    def resident(self, device: torch.device) -> Tensor | None:
        """Return a tensor of the same shape and elements that is already on this kind of device, or None."""
        return None

    def expect(self, numel: int) -> None:
        """Prepare for `numel` more elements to be read. The caller calls this before the first read."""

    def is_far(self) -> bool:
        """Return whether a read waits for something slow, such as a disk."""
        return False

    def check_unchanged(self) -> None:
        """Make sure that the elements have not changed, as far as that shows without reading them.

        Raises:
            NucleateError: They were changed. The message begins with the changed tensor or file.
        """


@torch.no_grad()
def fill_from(tensor: Tensor, given: ElementSource) -> None:
    """Fill a real tensor of any layout, dtype and device from an element source, with a buffer of a few MiB at most.

    Args:
        tensor: A tensor with the shape of the element source.
        given: The element source. Its elements are cast to the tensor's dtype.
    """
    assert tuple(tensor.shape) == tuple(given.shape)
    out = tensor.detach()
    if out.device.type != "cpu":
        _take_on_device(out, given)
    elif out.is_contiguous() and not (out.is_conj() or out.is_neg()):
        if out.numel():
            fill_range_from(out.view(-1), given, 0)
    else:
        held = torch.empty(min(out.numel(), _BUFFER_NUMEL), dtype=given.dtype, device="cpu")
        for start, part in slabs(out, _BUFFER_NUMEL):
            values = held[: part.numel()]
            given.read(start, values)
            part.copy_(values.view(part.shape))


def _take_on_device(out: Tensor, given: ElementSource) -> None:
    resident = given.resident(out.device)
    if resident is not None:
        out.copy_(resident)
        return
    dtype = given.dtype if casts_there(out.device, given.dtype, out.dtype) else out.dtype
    with Staging(out.device, out.numel() * dtype.itemsize) as staging:
        for start, part in slabs(out, staging.buffer_bytes // dtype.itemsize):
            values = staging.buffer()[: part.numel() * dtype.itemsize].view(dtype)
            fill_range_from(values, given, start)
            staging.send(values, part)


def fill_range_from(out: Tensor, given: ElementSource, start: int) -> None:
    """Fill contiguous memory on the CPU with the elements from `start` on, cast to the dtype of `out`."""
    if out.dtype == given.dtype:
        given.read(start, out)
        return
    with _buffer(min(out.numel(), _BUFFER_NUMEL), given.dtype) as buffer:
        for first in range(0, out.numel(), _BUFFER_NUMEL):
            part = out[first : first + _BUFFER_NUMEL]
            held = buffer[: part.numel()]
            given.read(start + first, held)
            for begin in range(0, part.numel(), _CAST_NUMEL):
                part[begin : begin + _CAST_NUMEL].copy_(held[begin : begin + _CAST_NUMEL])


@contextmanager
def _buffer(numel: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Lend uninitialized memory of this thread. A read into it may cast as well, and then gets memory of its own."""
    size_bytes = numel * dtype.itemsize
    free: list[Tensor] = _kept.__dict__.setdefault("free", [])
    memory = free.pop() if free else None
    if memory is None or memory.numel() < size_bytes:
        with torch.inference_mode(False):  # The buffer is also used outside of inference mode.
            memory = torch.empty(size_bytes, dtype=torch.uint8, device="cpu")
    try:
        yield memory[:size_bytes].view(dtype)
    finally:
        free.append(memory)
