"""Staging: values made or read on the host go to a device through a ring of pinned buffers.

One buffer is filled while the copies out of the others run on a stream of their own. An event behind the copies of a
buffer says when it may be written again. A copy never starts from a mapped file or other pageable memory, and each
byte crosses once. Values are cast on the device where fewer bytes cross that way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nucleate.devices.table import concrete, hooks_of

#: Bytes of one buffer.
BUFFER_BYTES = 32 << 20
#: Buffers of one ring: one is filled, one is copied, and one waits for either.
NUM_BUFFERS = 3
#: Values in a buffer begin at a multiple of so many bytes.
ALIGNMENT = 64


class Staging:
    """Copies host memory to one device for as long as it is open. One thread uses it.

    When it closes, also by an exception, all copies are done, and work that the caller then gives to the device comes
    behind them. A device that does not pin memory gets the same calls, with ordinary memory and copies that block.

    Args:
        device: The device. It need not be the current one.
        size_bytes: How many bytes are going to be copied: for fewer, the ring is smaller.
    """

    def __init__(self, device: torch.device, size_bytes: int) -> None:
        self.device = concrete(device)
        self._hooks = hooks_of(self.device)
        self.buffer_bytes = max(ALIGNMENT, min(BUFFER_BYTES, aligned(size_bytes)))
        self._pins = self._hooks.pins_memory
        self._buffers: list[Tensor | None] = [None] * max(1, min(NUM_BUFFERS, -(-size_bytes // BUFFER_BYTES)))
        self._events: list[torch.Event | None] = [None] * len(self._buffers)
        self._turn = len(self._buffers) - 1
        self._is_behind = True
        self._used = self.buffer_bytes
        self._stream: torch.Stream | None = None
        self._temporary: Tensor | None = None

    def __enter__(self) -> Staging:
        if self._pins:
            self._stream = self._hooks.make_stream(self.device)
            # Pending work may still use memory that was freed and is written now.
            self._stream.wait_stream(self._hooks.current_stream(self.device))
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._record()
            for event in self._events:
                if event is not None:
                    event.synchronize()
        finally:
            if self._stream is not None:
                # Some backends order a stream by this alone, and others give freed memory to the current stream.
                self._hooks.current_stream(self.device).wait_stream(self._stream)
            self._buffers, self._events, self._temporary = [], [], None

    def buffer(self) -> Tensor:
        """Return the next buffer as bytes, `(buffer_bytes,)`, once all copies out of it are done.

        What was sent before from the other buffers may still be on its way. Nothing more is sent from them.
        """
        self._record()
        self._turn = (self._turn + 1) % len(self._buffers)
        event = self._events[self._turn]
        if event is not None:
            event.synchronize()
        buffer = self._buffers[self._turn]
        if buffer is None:
            # Pinned memory belongs to the current accelerator; torch takes it as a keyword of a CPU tensor.
            buffer = torch.empty(self.buffer_bytes, dtype=torch.uint8, device="cpu", pin_memory=self._pins)
            self._buffers[self._turn] = buffer
        self._used = self.buffer_bytes
        return buffer

    def copied(self, source: Tensor) -> Tensor:
        """Return a copy of a tensor on the device. It is whole when the staging closes.

        Args:
            source: A strided tensor on the host, in memory of any kind. Small ones share a buffer.
        """
        out = torch.empty_like(source, device=self.device)
        if self._stream is not None:
            # As in `_memory`.
            self._stream.wait_stream(self._hooks.current_stream(self.device))
        if out.stride() != source.stride():
            source = source.contiguous()
        self.copy(source, out)
        return out

    def copy(self, source: Tensor, out: Tensor) -> None:
        """Copy a tensor in host memory of any kind to one on the device, through as many buffers as that takes.

        Args:
            source: On the host. It may be written as soon as this returns.
            out: On the device, of the same shape, strides and dtype.
        """
        limit = self.buffer_bytes // source.element_size()
        for (_, part), (_, place) in zip(slabs(source, limit), slabs(out, limit), strict=True):
            size_bytes = part.numel() * part.element_size()
            buffer, begin = self._buffers[self._turn], self._used
            if buffer is None or begin + size_bytes > self.buffer_bytes:
                buffer, begin = self.buffer(), 0
            host = buffer[begin : begin + size_bytes].view(part.dtype).view(part.shape).copy_(part)
            self._used = min(self.buffer_bytes, begin + aligned(size_bytes))
            self.send(host, place)

    def send(self, host: Tensor, out: Tensor) -> None:
        """Copy a part of the last buffer to a tensor on the device, cast to the tensor's dtype.

        Args:
            host: A contiguous part of the buffer, with as many elements as `out`. It must not be written any more.
            out: A tensor on the device, of any strides.
        """
        if not out.numel():
            return
        is_plain = out.is_contiguous() and not (out.is_conj() or out.is_neg())
        if is_plain and out.dtype == host.dtype:
            with self._on_stream():
                out.copy_(host.view(out.shape), non_blocking=self._pins)
        else:
            self.use(host, host.dtype, lambda values: out.copy_(values.view(out.shape)))

    def use(self, host: Tensor, dtype: torch.dtype, function: Callable[[Tensor], Any]) -> None:
        """Copy a part of the last buffer to the device and call a function on it there.

        Args:
            host: A contiguous part of the buffer, of one dim. Both it and the cast values fit into one buffer.
            dtype: What the values are cast to on the device.
            function: Gets the values, `(n,)`. It gives its work to the current stream and does not keep the values.
        """
        size_bytes = host.numel() * host.element_size()
        memory = self._memory()
        with self._on_stream():
            values = memory[:size_bytes].view(host.dtype)
            values.copy_(host.view(-1), non_blocking=self._pins)
            if dtype != host.dtype:
                begin = aligned(size_bytes)
                place = memory[begin : begin + host.numel() * dtype.itemsize].view(dtype)
                values = place.copy_(values)
            function(values)

    def _memory(self) -> Tensor:
        """Return memory on the device for what arrives and goes on from there, as large as a buffer."""
        if self._temporary is None:
            self._temporary = torch.empty(self.buffer_bytes, dtype=torch.uint8, device=self.device)
            if self._stream is not None:
                # It comes from the current stream, on which somebody may have freed it just now.
                self._stream.wait_stream(self._hooks.current_stream(self.device))
        # Copies out of it and into it are in order: all are on one stream.
        return self._temporary

    def _on_stream(self) -> AbstractContextManager[Any]:
        self._is_behind = False
        return nullcontext() if self._stream is None else self._stream

    def _record(self) -> None:
        """Put an event behind the copies out of the last buffer."""
        if self._stream is None or self._is_behind:
            return
        event = self._events[self._turn]
        if event is None:
            event = self._events[self._turn] = self._hooks.make_event(self.device)
        event.record(self._stream)
        self._is_behind = True


@torch.no_grad()
def move(source: torch.UntypedStorage, target: torch.UntypedStorage) -> None:
    """Copy the bytes of a storage on the host to the beginning of one on a device.

    Args:
        source: On the host.
        target: On a device; at least as large.
    """
    if not source.nbytes():
        return
    host, out = (torch.empty(0, dtype=torch.uint8, device=each.device).set_(each) for each in (source, target))
    with Staging(target.device, source.nbytes()) as staging:
        staging.copy(host, out[: source.nbytes()])


@functools.cache
def casts_there(device: torch.device, source: torch.dtype, target: torch.dtype) -> bool:
    """Return whether values should be cast on the device: not more bytes cross then, and the bits are the host's.

    Args:
        device: Where values go to.
        source: What they are before.
        target: What they are afterwards.
    """
    if source == target:
        return True
    # What becomes of a number that an integer cannot hold depends on the processor.
    is_exact = target.is_floating_point or target.is_complex or not (source.is_floating_point or source.is_complex)
    if source.itemsize > target.itemsize or not is_exact or (source.is_complex and not target.is_complex):
        return False
    try:
        torch.zeros(1, dtype=source, device=device).to(target)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError.
        return False
    return True


def slabs(tensor: Tensor, limit: int) -> Iterator[tuple[int, Tensor]]:
    """Yield parts of a tensor in the order of its elements, each with the number of its first element.

    Args:
        tensor: Of any strides.
        limit: How many elements a part has at most.
    """
    if tensor.numel() <= limit:
        if tensor.numel():
            yield 0, tensor
        return
    if tensor.is_contiguous():
        tensor = tensor.view(-1)
    row_numel = math.prod(tensor.shape[1:])
    step = limit // row_numel
    for first in range(0, tensor.shape[0], step or 1):
        if step:
            yield first * row_numel, tensor[first : first + step]
        else:
            yield from ((first * row_numel + start, part) for start, part in slabs(tensor[first], limit))


def fits(size_bytes: int) -> bool:
    """Return whether so many bytes fit into one buffer."""
    return size_bytes <= BUFFER_BYTES


def aligned(size_bytes: int) -> int:
    """Return the next multiple of the alignment."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT
