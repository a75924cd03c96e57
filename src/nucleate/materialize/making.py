"""The making of parts: several threads make them in host memory, and staging sends those of a device there.

Parts for a device are made in batches that fill one staging buffer, many small parts together. While the copies of one
batch run, the threads make the next batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch
from torch import Tensor

from nucleate.deferred import StreamCursors
from nucleate.devices import Staging
from nucleate.devices.staging import aligned
from nucleate.materialize.memory import FreshMemory
from nucleate.materialize.parts import Part
from nucleate.report.meter import Meter

#: One thread alone does less work than this.
MIN_NUMEL_PER_THREAD = 1 << 20

# A thread takes its next stretch when it has finished one, so that a slow thread does less.
_STRETCHES_PER_THREAD = 6
# A batch is small, and each stretch costs a jump to its position in the stream.
_STRETCHES_PER_THREAD_AND_BATCH = 2

# The smallest number of reading threads, also where fewer compute: from memory (False), and from a disk (True), which
# needs several requests at a time.
_READERS = {False: 2, True: 4}
# The bytes that are touched and then written. Shorter steps cost more in Python than the cache gives: 4 MiB took 1.03
# times as long for 1.1 billion bf16 parameters from memory.
_STEP_BYTES = 16 << 20


def make_parts(parts: Sequence[Part], num_threads: int, memory: FreshMemory | None = None) -> None:
    """Make parts by several threads, in the order of the random streams and files.

    Args:
        parts: The parts. The memory that receives them must not overlap.
        num_threads: The largest number of threads that compute. A few more may read.
        memory: The memory for the parts that was not written before.
    """
    lots: dict[tuple[torch.device, bool], list[Part]] = {}
    for part in sorted(parts, key=lambda part: part.maker.order(part.start)):
        part.maker.expect(part.num_rows * part.row_numel)
        lots.setdefault((part.device, part.maker.is_read), []).append(part)
    with Meter(sum(part.size_bytes for part in parts), "making parameters") as meter:
        for (device, is_read), some in lots.items():
            total = _work_of(some)
            is_far = is_read and any(part.maker.is_far for part in some)
            most = max(num_threads, _READERS[is_far]) if is_read else num_threads
            with _Makers(max(1, min(most, total // MIN_NUMEL_PER_THREAD))) as makers:
                if device.type == "cpu":
                    with _touched_ahead(some, memory) if is_far and memory else nullcontext():
                        makers.make(some, _STRETCHES_PER_THREAD, meter, memory)
                else:
                    _make_staged(device, some, makers, meter)


def _touched_ahead(parts: Sequence[Part], memory: FreshMemory) -> AbstractContextManager[None]:
    """Return a context in which memory is touched far ahead of readers that wait for a disk.

    Other threads touch memory just before they write it, so that it is in a cache.
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
    return buffer[: part.numel * part.maker.dtype.itemsize].view(part.maker.dtype)


def _batches(parts: Sequence[Part], limit: int) -> Iterator[list[tuple[Part, int]]]:
    """Cut parts into batches that fill buffers of `limit` bytes. Each part comes with its first byte in the buffer."""
    batch: list[tuple[Part, int]] = []
    used = 0
    for part in parts:
        first = 0
        while first < part.num_rows:
            rows = min(part.num_rows - first, (limit - used) // part.row_bytes)
            if rows < part.num_rows - first:
                # Multiples of 64 as in `_stretches`. The next buffer has room for a longer range of a file.
                whole = rows - rows % 64 if part.row_numel == 1 else rows
                if batch and (not whole or whole * part.row_numel < part.maker.grain):
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
    """A context with the threads that make parts in host memory.

    Args:
        num_threads: The number of threads.
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
        """Make parts in host memory.

        Args:
            parts: The parts, in the order of the streams.
            num_stretches: The number of stretches for each thread.
            meter: The counter of made bytes.
            memory: The memory for the parts that was not written before.
        """
        if self._pool is None:
            _make(parts, meter, memory)
            return
        stretches = list(_stretches(parts, _work_of(parts), self._num_threads * num_stretches))
        # torch's inference mode holds for one thread, and an inference tensor may only be written in that mode.
        inference = torch.is_inference_mode_enabled()

        def make(stretch: Sequence[Part]) -> None:
            with torch.inference_mode(inference):
                _make(stretch, meter, memory)

        futures = [self._pool.submit(make, stretch) for stretch in stretches]
        try:
            for done in futures:
                done.result()
        except BaseException:
            # No thread may continue to write memory that the caller is about to free.
            self._pool.shutdown(cancel_futures=True)
            raise


def _work_of(parts: Sequence[Part]) -> int:
    return sum(part.num_rows * part.row_numel for part in parts)


def _make(parts: Sequence[Part], meter: Meter | None, memory: FreshMemory | None) -> None:
    every: dict[object, StreamCursors] = {}
    for part in (step for whole in parts for step in _steps(whole)) if memory else parts:
        program = part.maker.program
        if program not in every:
            every[program] = StreamCursors(program)
        if memory:
            for place in part.places:
                memory.touch(place)
        part.make(every[program])
        if meter is not None:
            meter.add(part.size_bytes)
    for cursors in every.values():
        cursors.remember()


def _steps(part: Part) -> Iterator[Part]:
    """Cut a part so that each new part is made while its touched memory is in a cache."""
    rows = max(1, part.num_rows * _STEP_BYTES // max(1, part.size_bytes))
    rows += -rows % 64 if part.row_numel == 1 else 0  # as in `_stretches`
    if rows >= part.num_rows or part.maker.grain > 1:
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
            # At least a grain, because files must not be read in short ranges.
            least = max(room, part.maker.grain)
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
