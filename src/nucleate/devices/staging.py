"""Staging: values made or read on the host go to a device through a ring of pinned buffers.

One buffer is filled while the copies from the others run on a separate stream. An event behind the copies of a buffer
shows when the buffer may be written again. A copy never starts from a mapped file or other pageable memory, and each
byte is sent once. Values are cast on the device where this sends fewer bytes.
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
#: Values in a buffer begin at a multiple of this number of bytes.
ALIGNMENT = 64


class Staging:
    """A context in which one thread copies host memory to one device.

    When the context ends, also by an exception, all copies are done. Work that the caller then gives to the device
    runs after them. A device that does not pin memory gets the same calls, with ordinary memory and blocking copies.

    Args:
        device: The device. It need not be the current one.
        size_bytes: The number of bytes to copy. For few bytes, the ring is smaller.
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
            # Pending work may still use freed memory, which the copies are about to write.
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
                # Some backends order streams only by this call, and others give freed memory to the current stream.
                self._hooks.current_stream(self.device).wait_stream(self._stream)
            self._buffers, self._events, self._temporary = [], [], None

    def buffer(self) -> Tensor:
        """Return the next buffer as bytes, `(buffer_bytes,)`, after all copies from it are done.

        Earlier copies from the other buffers may still run. No new copies start from them.
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
        """Return a copy of a tensor on the device. The copy is complete when the context ends.

        Args:
            source: A strided tensor on the host, in memory of any kind. Small ones share a buffer.
        """
        out = torch.empty_like(source, device=self.device)
        if self._stream is not None:
            # For the reason given in `_memory`.
            self._stream.wait_stream(self._hooks.current_stream(self.device))
        if out.stride() != source.stride():
            source = source.contiguous()
        self.copy(source, out)
        return out

    def copy(self, source: Tensor, out: Tensor) -> None:
        """Copy a tensor in host memory of any kind to one on the device, through as many buffers as necessary.

        Args:
            source: The tensor on the host. It may be written as soon as this method returns.
            out: The tensor on the device, of the same shape, strides and dtype.
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
            host: A contiguous part of the buffer, with as many elements as `out`. The caller must not write it again.
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
            dtype: The dtype to which the values are cast on the device.
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
        """Return memory on the device, as large as a buffer, for values that a function then uses there."""
        if self._temporary is None:
            self._temporary = torch.empty(self.buffer_bytes, dtype=torch.uint8, device=self.device)
            if self._stream is not None:
                # The memory comes from the current stream, where other work may have freed it just now.
                self._stream.wait_stream(self._hooks.current_stream(self.device))
        # Copies from and to this memory are in order, because all are on one stream.
        return self._temporary

    def _on_stream(self) -> AbstractContextManager[Any]:
        self._is_behind = False
        return nullcontext() if self._stream is None else self._stream

    def _record(self) -> None:
        """Put an event behind the copies from the last buffer."""
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
        source: The storage on the host.
        target: The storage on a device, at least as large.
    """
    if not source.nbytes():
        return
    host, out = (torch.empty(0, dtype=torch.uint8, device=each.device).set_(each) for each in (source, target))
    with Staging(target.device, source.nbytes()) as staging:
        staging.copy(host, out[: source.nbytes()])


@functools.cache
def casts_there(device: torch.device, source: torch.dtype, target: torch.dtype) -> bool:
    """Return whether values should be cast on the device: this sends no more bytes, and the bits are those of the host.

    Args:
        device: The device that receives the values.
        source: Their dtype before the cast.
        target: Their dtype after the cast.
    """
    if source == target:
        return True
    # The cast of a number that an integer dtype cannot hold depends on the processor.
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
        tensor: A tensor of any strides.
        limit: The largest number of elements of a part.
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
    """Return whether `size_bytes` bytes fit into one buffer."""
    return size_bytes <= BUFFER_BYTES


def aligned(size_bytes: int) -> int:
    """Return the number of bytes, rounded up to a multiple of the alignment."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT
