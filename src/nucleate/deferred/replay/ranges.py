"""Pieces: a storage of which any range of elements can be made alone.

Most of a model's memory is a random fill, or a constant, and a few operations on each element by itself. Of such a
storage a rank makes its own shard and nothing else, several threads make one parameter, and a chain of operations
runs while a chunk of it is in the cache. What only moves elements of files (joins, splits, transposes) runs on large
ranges instead, so that files are read in long runs. Which storages are such, `live_writes.py` reads from the tape; the
others are replayed whole (`replayer.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nucleate.deferred.elements.source import Given
from nucleate.deferred.randomness.cursors import Cursors
from nucleate.deferred.randomness.program import RandomProgram
from nucleate.deferred.replay.writes import (
    BUFFER_NUMEL,
    CHUNK_NUMEL,
    Copied,
    Drawn,
    Filled,
    Joined,
    RangedStorage,
    Read,
    Source,
    Write,
    derived_source,
    dtype_of,
    grain_of,
    sources_of,
)
from nucleate.deferred.tape.steps import Constant, Position

# Which writes concern a chunk is looked up for so many chunks at once.
_CHUNKS_PER_BLOCK = 32
# More than there are runs of random numbers.
_BEHIND_DRAWN = 1 << 48


@dataclass(slots=True)
class Pieces(RangedStorage):
    """A storage of a tape of which ranges can be made.

    Attributes:
        program: The random program of the tape.
        numel: How many elements it has.
        dtype: Of which dtype.
        writes: What is done to it, in order.
    """

    program: RandomProgram | None
    numel: int
    dtype: torch.dtype
    writes: list[Write]
    #: Whether elements are only moved, cast and filled in, so that ranges of any size are made in one go.
    is_moved: bool = field(init=False)
    #: How many elements should be made at a time, so that files are read in long runs.
    grain: int = field(init=False)

    def __post_init__(self) -> None:
        """Look at the writes."""
        self.is_moved = all(
            isinstance(write, (Filled, Read, Copied, Joined))
            and all(source.pieces.is_moved for source in sources_of(write))
            for write in self.writes
        )
        self.grain = max((grain_of(write) for write in self.writes), default=1)

    @classmethod
    def of(cls, given: Given, dtype: torch.dtype) -> Pieces:
        """Return pieces of what is given alone, cast to a dtype."""
        numel = math.prod(given.shape)
        return cls(None, numel, dtype, [Read(0, numel, True, given)])

    def make(self, start: int, out: Tensor, cursors: Cursors) -> None:
        only = self._only()
        if self.is_moved or isinstance(only, Joined):
            # It needs no cache, or what it consists of sees to that.
            self.make_chunk(start, out, cursors)
            return
        # What is only drawn needs no cache, and torch never splits it; so threads meet in Python less often.
        step = 4 * CHUNK_NUMEL if isinstance(only, Drawn) else CHUNK_NUMEL
        block = step * _CHUNKS_PER_BLOCK
        for first in range(0, out.numel(), block):
            last = min(out.numel(), first + block)
            writes = [write for write in self.writes if write.start < start + last and start + first < write.stop]
            for begin in range(first, last, step):
                self.make_chunk(start + begin, out[begin : min(last, begin + step)], cursors, writes)

    def cast(self, start: int, out: Tensor, cursors: Cursors) -> None:
        only = self._only()
        if out.dtype == self.dtype:
            self.make(start, out, cursors)
        elif self.is_moved and (isinstance(only, Joined) or dtype_of(only) == self.dtype):
            # The cast happens where it is read.
            assert only is not None
            only.apply(start - only.start, out, cursors)
        else:
            buffer = torch.empty(min(out.numel(), BUFFER_NUMEL), dtype=self.dtype, device="cpu")
            for first in range(0, out.numel(), BUFFER_NUMEL):
                part = out[first : first + BUFFER_NUMEL]
                held = buffer[: part.numel()]
                self.make(start + first, held, cursors)
                part.copy_(held)

    def make_chunk(self, start: int, out: Tensor, cursors: Cursors, writes: list[Write] | None = None) -> None:
        stop = start + out.numel()
        for write in self.writes if writes is None else writes:
            begin, end = max(start, write.start), min(stop, write.stop)
            if begin < end:
                write.apply(begin - write.start, out[begin - start : end - start], cursors)

    def memory(self) -> torch.UntypedStorage | None:
        """Return memory that has the whole content already and may become the storage itself, or None."""
        given = self.given()
        return None if given is None or given.dtype != self.dtype else given.memory()

    def given(self) -> Given | None:
        only = self._only()
        if not isinstance(only, Read) or only.first or math.prod(only.given.shape) != self.numel:
            return None
        return only.given

    def viewed(self) -> Source | None:
        """Return the tensor that the elements are those of, in its order, if that is all there is."""
        only = self._only()
        if isinstance(only, Copied) and isinstance(only.source, Source):
            source: Source | None = only.source
        else:
            source = derived_source(only.given) if isinstance(only, Read) and not only.first else None
        return source if source is not None and source.pieces.dtype == self.dtype else None

    def box(self, shape: Sequence[int], offsets: Sequence[int], size: Sequence[int]) -> Pieces | None:
        """Return pieces of a box of a contiguous tensor that takes all elements, where the rest need not be read.

        Args:
            shape: The tensor's shape.
            offsets: The box's first index in each dimension.
            size: The box's size.
        """
        source = self.viewed()
        if source is None or source.size is None or not source.pieces.is_moved or math.prod(shape) != self.numel:
            return None
        try:
            view = torch.empty_strided(source.size, source.stride, device="meta").view(tuple(shape))
        except RuntimeError:
            return None
        start = source.start + sum(place * step for place, step in zip(offsets, view.stride(), strict=True))
        numel = math.prod(size)
        part = Source(source.pieces, start, tuple(size), view.stride())
        return Pieces(self.program, numel, self.dtype, [Copied(0, numel, True, part)])

    def constant(self) -> bool | int | float | None:
        """Return the number that all elements are, or None where they differ or are not known."""
        only = self._only()
        return only.value if isinstance(only, Filled) else None

    def uncast(self) -> Pieces:
        """Return the same elements before they are cast, where they are read from one place and a cast is all."""
        only = self._only()
        dtype = dtype_of(only)
        if only is None or dtype is None or dtype == self.dtype:
            return self
        return Pieces(self.program, self.numel, dtype, [only])

    @property
    def is_on_host(self) -> bool:
        """Whether elements are only moved, cast and filled in, and all that they are read from is on the host."""
        return self.is_moved and all(constant.tensor.device.type == "cpu" for constant in self._constants())

    def _only(self) -> Write | None:
        """Return the write that is all there is, if it is of the whole."""
        write = self.writes[0]
        return write if len(self.writes) == 1 and (write.start, write.stop) == (0, self.numel) else None

    def order(self, start: int) -> tuple[int, int]:
        """Return a key by which parts are made in the order of the random stream, and those of files behind them.

        Args:
            start: The part's first element.
        """
        read = next(self._reads(), None)
        if read is not None:
            file, place = read.given.order(read.first + start)
            return (_BEHIND_DRAWN + file, place)
        position = next(self._positions(), None)
        return (-1, start) if position is None else (position.run.number, position.offset + start)

    def expect(self, numel: int) -> None:
        """Tell those that the elements are read from how many are going to be read."""
        for read in self._reads():
            read.given.expect(min(numel, math.prod(read.given.shape)))

    @property
    def is_far(self) -> bool:
        """Whether making elements waits for something slow, such as a disk."""
        return any(read.given.is_far() for read in self._reads())

    @property
    def is_read(self) -> bool:
        """Whether the elements are read from one place, and a cast is all that happens to them."""
        return isinstance(self._only(), Read)

    def prepare(self) -> None:
        """Execute the steps that the states it begins at depend on, so that threads need not.

        Raises:
            DeferredEditError: A real tensor that it reads was edited.
        """
        for position in self._positions():
            assert self.program is not None
            self.program.nearest(position)
        for constant in self._constants():
            constant.check()

    def _constants(self) -> Iterator[Constant]:
        for write in self.all_writes(set()):
            if isinstance(write, Copied) and isinstance(write.source, Constant):
                yield write.source

    def _reads(self) -> Iterator[Read]:
        yield from (write for write in self.all_writes(set()) if isinstance(write, Read))

    def _positions(self) -> Iterator[Position]:
        yield from (write.position for write in self.all_writes(set()) if isinstance(write, Drawn))

    def all_writes(self, seen: set[int]) -> Iterator[Write]:
        if id(self) in seen:
            return
        seen.add(id(self))
        for write in self.writes:
            yield write
            for source in sources_of(write):
                yield from source.pieces.all_writes(seen)
