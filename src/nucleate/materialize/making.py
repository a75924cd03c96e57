"""Making parts: several threads make them in host memory, and those of a device go there by staging.

What goes to a device is made in batches that fill one staging buffer, many small parts together. While the copies of
one batch run, the threads make the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch
from torch import Tensor

from nucleate.deferred import Cursors
from nucleate.devices import Staging
from nucleate.devices.staging import aligned
from nucleate.materialize.memory import FreshMemory
from nucleate.materialize.parts import Part
from nucleate.report.meter import Meter

#: Less work than this is done by one thread.
MIN_NUMEL_PER_THREAD = 1 << 20

# Threads take their next stretch of the stream when they are done with one, so that a slow one does less.
_STRETCHES_PER_THREAD = 6
# A batch is small: each stretch costs a jump to its place in the stream.
_STRETCHES_PER_THREAD_AND_BATCH = 2

# So many threads read at least, however few compute: from memory, and from a disk, which wants several questions at a
# time.
_READERS = {False: 2, True: 4}
# So much is touched and then written. Shorter steps cost more in Python than the cache gives: 4 MiB took 1.03 times as
# long for 1.1 billion bf16 parameters from memory.
_STEP_BYTES = 16 << 20


def make_parts(parts: Sequence[Part], num_threads: int, memory: FreshMemory | None = None) -> None:
    """Make parts, in the order of the random streams and files, by several threads.

    Args:
        parts: They must not overlap where they go.
        num_threads: How many threads at most.
        memory: Memory where they go that was not written before.
    """
    lots: dict[tuple[torch.device, bool], list[Part]] = {}
    for part in sorted(parts, key=lambda part: part.pieces.order(part.start)):
        part.pieces.expect(part.num_rows * part.row_numel)
        lots.setdefault((part.device, part.pieces.is_read), []).append(part)
    with Meter(sum(part.size_bytes for part in parts), "making parameters") as meter:
        for (device, is_read), some in lots.items():
            total = _work_of(some)
            is_far = is_read and any(part.pieces.is_far for part in some)
            most = max(num_threads, _READERS[is_far]) if is_read else num_threads
            with _Makers(max(1, min(most, total // MIN_NUMEL_PER_THREAD))) as makers:
                if device.type == "cpu":
                    with _touched_ahead(some, memory) if is_far and memory else nullcontext():
                        makers.make(some, _STRETCHES_PER_THREAD, meter, memory)
                else:
                    _make_staged(device, some, makers, meter)


def _touched_ahead(parts: Sequence[Part], memory: FreshMemory) -> AbstractContextManager[None]:
    """Return a context in which memory is touched far ahead of readers that wait for a disk.

    Others touch it just before they write, while it is in a cache.
    """
    return memory.touched_ahead(place for part in parts for step in _steps(part) for place in step.places)


def _make_staged(device: torch.device, parts: Sequence[Part], makers: _Makers, meter: Meter) -> None:
    """Make parts batch by batch, and send each batch while the next one is made."""
    crossing: list[Part] = []
    for part in parts:
        if part.make_there():
            meter.add(part.size_bytes)
        else:
            crossing.append(part)
    if not crossing:
        return
    with Staging(device, sum(aligned(part.num_rows * part.row_bytes) for part in crossing)) as staging:
        for batch in _batches(crossing, staging.buffer_bytes):
            buffer = staging.buffer()
            held = [(part, _memory(part, buffer[start:])) for part, start in batch]
            makers.make([part.on_host(memory) for part, memory in held], _STRETCHES_PER_THREAD_AND_BATCH)
            for part, memory in held:
                part.send(staging, memory)
                meter.add(part.size_bytes)


def _memory(part: Part, buffer: Tensor) -> Tensor:
    return buffer[: part.numel * part.pieces.dtype.itemsize].view(part.pieces.dtype)


def _batches(parts: Sequence[Part], limit: int) -> Iterator[list[tuple[Part, int]]]:
    """Cut parts so that they fill buffers of so many bytes, each with the place where it begins there."""
    batch: list[tuple[Part, int]] = []
    used = 0
    for part in parts:
        first = 0
        while first < part.num_rows:
            rows = min(part.num_rows - first, (limit - used) // part.row_bytes)
            if rows < part.num_rows - first:
                # As in `_stretches`, and the next buffer has room for a longer run of a file.
                whole = rows - rows % 64 if part.row_numel == 1 else rows
                if batch and (not whole or whole * part.row_numel < part.pieces.grain):
                    yield batch
                    batch, used = [], 0
                    continue
                rows = whole or rows
            assert rows, "a row fits into a buffer"
            batch.append((part.cut(first, first + rows), used))
            used = min(limit, aligned(used + rows * part.row_bytes))
            first += rows
    if batch:
        yield batch


class _Makers:
    """The threads that make parts in host memory, as long as this is open.

    Args:
        num_threads: How many.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> _Makers:
        if self._num_threads > 1:
            self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="nucleate-materialize")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=error is not None)

    def make(
        self,
        parts: Sequence[Part],
        num_stretches: int,
        meter: Meter | None = None,
        memory: FreshMemory | None = None,
    ) -> None:
        """Make parts, all of them on the host.

        Args:
            parts: In the order of the streams.
            num_stretches: Into how many stretches for each thread they are split.
            meter: Told of what is made.
            memory: Memory where they go that was not written before.
        """
        if self._pool is None:
            _make(parts, meter, memory)
            return
        stretches = list(_stretches(parts, _work_of(parts), self._num_threads * num_stretches))
        # A mode of torch's holds for one thread, and an inference tensor may only be written in that mode.
        inference = torch.is_inference_mode_enabled()

        def make(stretch: Sequence[Part]) -> None:
            with torch.inference_mode(inference):
                _make(stretch, meter, memory)

        futures = [self._pool.submit(make, stretch) for stretch in stretches]
        try:
            for done in futures:
                done.result()
        except BaseException:
            # No thread may go on writing to memory that the caller is about to give up.
            self._pool.shutdown(cancel_futures=True)
            raise


def _work_of(parts: Sequence[Part]) -> int:
    return sum(part.num_rows * part.row_numel for part in parts)


def _make(parts: Sequence[Part], meter: Meter | None, memory: FreshMemory | None) -> None:
    every: dict[object, Cursors] = {}
    for part in (step for whole in parts for step in _steps(whole)) if memory else parts:
        program = part.pieces.program
        if program not in every:
            every[program] = Cursors(program)
        if memory:
            for place in part.places:
                memory.touch(place)
        part.make(every[program])
        if meter is not None:
            meter.add(part.size_bytes)
    for cursors in every.values():
        cursors.remember()


def _steps(part: Part) -> Iterator[Part]:
    """Cut a part so that each piece is made while the memory that was touched for it is in a cache."""
    rows = max(1, part.num_rows * _STEP_BYTES // max(1, part.size_bytes))
    rows += -rows % 64 if part.row_numel == 1 else 0  # as in `_stretches`
    if rows >= part.num_rows or part.pieces.grain > 1:
        yield part
        return
    for first in range(0, part.num_rows, rows):
        yield part.cut(first, min(part.num_rows, first + rows))


def _stretches(parts: Sequence[Part], total: int, count: int) -> Iterator[list[Part]]:
    """Split the work into about `count` lists of equal size, in order."""
    goal = -(-total // count)
    stretch: list[Part] = []
    room = goal
    for part in parts:
        first = 0
        while first < part.num_rows:
            # Not so few elements that files would be read in short runs.
            least = max(room, part.pieces.grain)
            last = min(part.num_rows, first + max(1, -(-least // part.row_numel)))
            if 0 < part.num_rows - last < 1024:
                last = part.num_rows
            elif last % 64 and last < part.num_rows and part.row_numel == 1:
                # Neither a group of `normal_` nor a cache line is split.
                last = min(part.num_rows, last + 64 - last % 64)
            stretch.append(part.cut(first, last))
            room -= (last - first) * part.row_numel
            first = last
            if room <= 0:
                yield stretch
                stretch, room = [], goal
    if stretch:
        yield stretch
