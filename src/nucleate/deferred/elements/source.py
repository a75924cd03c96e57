"""What a deferred tensor's content may be besides a recipe: elements that somebody else has, such as a file.

`give` records that a tensor is overwritten by them, as one step on the tape like any other. So what the tensor is
afterwards cast to, tied to, copied into or edited by needs no special case, what it held before is dead and never
made, and a rank that owns a part of it reads that part and nothing else.
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
#: Elements that are read at a time where they go through a buffer.
_BUFFER_NUMEL = 1 << 18
# Each thread keeps its buffers: new memory would have to be found and cleared by the system for every tensor.
_kept = threading.local()


class Given(ABC):
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
            start: The first one.
            out: One-dimensional, contiguous, on the CPU and of this dtype: as many as are wanted.
        """

    @abstractmethod
    def order(self, start: int) -> tuple[int, int]:
        """Return a key by which ranges that begin at `start` are read in the best order."""

    @abstractmethod
    def describe(self) -> str:
        """Return what is equal on ranks that are given the same elements, and else is not."""

    def memory(self) -> torch.UntypedStorage | None:
        """Return memory that holds the elements already and may become the tensor's own, or None."""
        return None

    def resident(self, device: torch.device) -> Tensor | None:
        """Return a tensor of the shape with the elements that is on this kind of device already, or None."""
        return None

    def expect(self, numel: int) -> None:
        """Know that so many elements more are going to be read; said before the first is read."""

    def is_far(self) -> bool:
        """Return whether reading waits for something slow, such as a disk."""
        return False

    def check_unchanged(self) -> None:
        """Make sure that the elements are those that were given, as far as that is seen without reading them.

        Raises:
            NucleateError: They were changed; the message begins with what was changed.
        """


@torch.no_grad()
def take(tensor: Tensor, given: Given) -> None:
    """Fill a real tensor of any layout, dtype and device with what is given, in a buffer of a few MiB at most.

    Args:
        tensor: It has the shape of what is given.
        given: The elements, which are cast to the tensor's dtype.
    """
    assert tuple(tensor.shape) == tuple(given.shape)
    out = tensor.detach()
    if out.device.type != "cpu":
        _take_on_device(out, given)
    elif out.is_contiguous() and not (out.is_conj() or out.is_neg()):
        if out.numel():
            take_range(out.view(-1), given, 0)
    else:
        held = torch.empty(min(out.numel(), _BUFFER_NUMEL), dtype=given.dtype, device="cpu")
        for start, part in slabs(out, _BUFFER_NUMEL):
            values = held[: part.numel()]
            given.read(start, values)
            part.copy_(values.view(part.shape))


def _take_on_device(out: Tensor, given: Given) -> None:
    resident = given.resident(out.device)
    if resident is not None:
        out.copy_(resident)
        return
    dtype = given.dtype if casts_there(out.device, given.dtype, out.dtype) else out.dtype
    with Staging(out.device, out.numel() * dtype.itemsize) as staging:
        for start, part in slabs(out, staging.buffer_bytes // dtype.itemsize):
            values = staging.buffer()[: part.numel() * dtype.itemsize].view(dtype)
            take_range(values, given, start)
            staging.send(values, part)


def take_range(out: Tensor, given: Given, start: int) -> None:
    """Fill contiguous memory on the CPU with the elements from `start` on, cast to its dtype."""
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
    """Lend memory of this thread, with anything in it.

    Reading into it may need such memory as well, which is other memory then.
    """
    size_bytes = numel * dtype.itemsize
    free: list[Tensor] = _kept.__dict__.setdefault("free", [])
    memory = free.pop() if free else None
    if memory is None or memory.numel() < size_bytes:
        with torch.inference_mode(False):  # It is used outside of that as well.
            memory = torch.empty(size_bytes, dtype=torch.uint8, device="cpu")
    try:
        yield memory[:size_bytes].view(dtype)
    finally:
        free.append(memory)
