"""What a deferred tensor's content may be besides a recipe: elements that somebody else has, such as a file.

`give` records that a tensor is overwritten by them, as one step on the tape like any other. So what the tensor is
afterwards cast to, tied to, copied into or edited by needs no special case, what it held before is dead and never
made, and a rank that owns a part of it reads that part and nothing else.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nucleate.deferred.pieces import Source

#: Elements that are cast at a time: torch does not split the work over threads of its own (`at::internal::GRAIN_SIZE`).
_CAST_NUMEL = 1 << 15
#: Elements that are read at a time where they go through a buffer.
_BUFFER_NUMEL = 1 << 18
# Each thread keeps its buffer: new memory would have to be found and cleared by the system for every tensor.
_kept = threading.local()
#: The same for another device, where a large buffer makes the better copy.
_PINNED_NUMEL = 1 << 24


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

    def check_unchanged(self) -> None:
        """Make sure that the elements are those that were given, as far as that is seen without reading them.

        Raises:
            NucleateError: They were changed; the message begins with what was changed.
        """

    def source(self) -> Source | None:
        """Return where the elements come from, if they are those of other pieces; ranges are then made there."""
        return None


def take(tensor: Tensor, given: Given) -> None:
    """Fill a real tensor of any layout, dtype and device with what is given, in a buffer of a few MiB at most.

    Args:
        tensor: It has the shape of what is given.
        given: The elements, which are cast to the tensor's dtype.
    """
    assert tuple(tensor.shape) == tuple(given.shape)
    if not tensor.numel():
        return
    with torch.no_grad():
        if tensor.device.type == "cpu" and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
            take_range(tensor.detach().view(-1), given, 0)
            return
        rows = tensor.detach() if tensor.dim() else tensor.detach().view(1)
        row_numel = math.prod(rows.shape[1:])
        on_cpu = tensor.device.type == "cpu"
        step = max(1, (_BUFFER_NUMEL if on_cpu else _PINNED_NUMEL) // row_numel)
        # Two buffers, so that one is read into while the other is on its way to the device.
        buffers = [
            torch.empty(min(step, rows.shape[0]) * row_numel, dtype=given.dtype, device="cpu", pin_memory=not on_cpu)
            for _ in range(1 if on_cpu else 2)
        ]
        copied: list[torch.cuda.Event | None] = [None] * len(buffers)
        for turn, first in enumerate(range(0, rows.shape[0], step)):
            number = turn % len(buffers)
            event = copied[number]
            if event is not None:
                event.synchronize()
            target = rows[first : first + step]
            buffer = buffers[number][: target.numel()]
            given.read(first * row_numel, buffer)
            # As it is first: a copy between devices would cast on the CPU, where that is slow.
            arrived = buffer.view(target.shape).to(tensor.device, non_blocking=not on_cpu)
            target.copy_(arrived)
            if tensor.device.type == "cuda":
                copied[number] = torch.cuda.Event()
                copied[number].record(torch.cuda.current_stream(tensor.device))  # type: ignore[union-attr]
        for event in copied:
            if event is not None:
                event.synchronize()


def take_range(out: Tensor, given: Given, start: int) -> None:
    """Fill contiguous memory on the CPU with the elements from `start` on, cast to its dtype."""
    if out.dtype == given.dtype:
        given.read(start, out)
        return
    buffer = _buffer(min(out.numel(), _BUFFER_NUMEL), given.dtype)
    for first in range(0, out.numel(), _BUFFER_NUMEL):
        part = out[first : first + _BUFFER_NUMEL]
        held = buffer[: part.numel()]
        given.read(start + first, held)
        for begin in range(0, part.numel(), _CAST_NUMEL):
            part[begin : begin + _CAST_NUMEL].copy_(held[begin : begin + _CAST_NUMEL])


def _buffer(numel: int, dtype: torch.dtype) -> Tensor:
    """Return memory of this thread, with anything in it."""
    size_bytes = numel * dtype.itemsize
    memory: Tensor | None = getattr(_kept, "memory", None)
    if memory is None or memory.numel() < size_bytes:
        with torch.inference_mode(False):  # It is used outside of that as well.
            memory = _kept.memory = torch.empty(size_bytes, dtype=torch.uint8, device="cpu")
    return memory[:size_bytes].view(dtype)
