"""Pieces: a storage of which any range of elements can be made alone.

Most of a model's memory is a random fill, or a constant, and a few operations on each element by itself. Of such a
storage a rank makes its own shard and nothing else, several threads make one parameter, and a chain of operations
runs while a chunk of it is in the cache. Which storages are such, `live_writes.py` reads from the tape; the others are
replayed whole (`replay.py`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nucleate.deferred.cursors import Cursors
from nucleate.deferred.fills import Fill
from nucleate.deferred.given import Given, take_range
from nucleate.deferred.random_program import Position, RandomProgram
from nucleate.deferred.tape import Constant

#: Elements that are made at a time: they stay in the second-level cache, and torch does not split the work over
#: threads of its own (`at::internal::GRAIN_SIZE`).
CHUNK_NUMEL = 1 << 15

# Which writes concern a chunk is looked up for so many chunks at once.
_CHUNKS_PER_BLOCK = 32
# More than there are runs of random numbers.
_BEHIND_DRAWN = 1 << 48


@dataclass(slots=True)
class Source:
    """A range of another storage, as wide as the write that reads it."""

    pieces: Pieces
    start: int

    def read(self, begin: int, numel: int, cursors: Cursors) -> Tensor:
        out = torch.empty(numel, dtype=self.pieces.dtype, device="cpu")
        self.pieces.make_chunk(self.start + begin, out, cursors)
        return out


@dataclass(slots=True)
class Write:
    """What one step does to a range of a storage.

    Attributes:
        start: The first element it writes.
        stop: The one behind the last.
        blind: Whether it does not look at what was there.
    """

    start: int
    stop: int
    blind: bool

    def apply(self, begin: int, out: Tensor, cursors: Cursors) -> None:
        """Write to `out`, which begins `begin` elements behind `start`."""
        raise NotImplementedError


@dataclass(slots=True)
class Drawn(Write):
    """A random fill."""

    fill: Fill
    position: Position

    def apply(self, begin: int, out: Tensor, cursors: Cursors) -> None:
        self.fill.make(begin, out, lambda offset, count: cursors.seek(self.position, offset, count))


@dataclass(slots=True)
class Filled(Write):
    """The same value everywhere."""

    value: Any

    def apply(self, begin: int, out: Tensor, cursors: Cursors) -> None:
        out.fill_(self.value)


@dataclass(slots=True)
class Copied(Write):
    """Elements of another storage, or of a real tensor, cast."""

    source: Source | Constant

    def apply(self, begin: int, out: Tensor, cursors: Cursors) -> None:
        if isinstance(self.source, Constant):
            out.copy_(self.source.tensor.detach().view(-1)[begin : begin + out.numel()])
        else:
            out.copy_(self.source.read(begin, out.numel(), cursors))


@dataclass(slots=True)
class Read(Write):
    """Elements that are given from elsewhere, cast."""

    given: Given
    # Which of its elements is the first that is written.
    first: int = 0

    def apply(self, begin: int, out: Tensor, cursors: Cursors) -> None:
        take_range(out, self.given, self.first + begin)


@dataclass(slots=True)
class Joined(Write):
    """Several storages side by side, as `cat` and `stack` lay them.

    Attributes:
        sources: Where each lies.
        bounds: Of each the first element within one row of the whole, and how long a row is.
    """

    sources: Sequence[Source]
    bounds: Sequence[int]

    def apply(self, begin: int, out: Tensor, cursors: Cursors) -> None:
        done = 0
        while done < out.numel():
            row, column = divmod(begin + done, self.bounds[-1])
            number = bisect_right(self.bounds, column) - 1
            source, first, last = self.sources[number], self.bounds[number], self.bounds[number + 1]
            end = min(out.numel(), done + last - column)
            source.pieces.make(source.start + row * (last - first) + column - first, out[done:end], cursors)
            done = end


@dataclass(slots=True)
class Computed(Write):
    """An operation on each element by itself."""

    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]

    def apply(self, begin: int, out: Tensor, cursors: Cursors) -> None:
        args = [arg.read(begin, out.numel(), cursors) if isinstance(arg, Source) else arg for arg in self.args]
        if self.blind:
            out.copy_(self.func(*args, **self.kwargs))
        else:
            self.func(out, *args, **self.kwargs)


@dataclass(slots=True)
class Pieces:
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

    @classmethod
    def of(cls, given: Given, dtype: torch.dtype) -> Pieces:
        """Return pieces of what is given alone, cast to a dtype."""
        numel = math.prod(given.shape)
        return cls(None, numel, dtype, [Read(0, numel, True, given)])

    def make(self, start: int, out: Tensor, cursors: Cursors) -> None:
        """Make the elements from `start` on.

        Args:
            start: The first element.
            out: One-dimensional, contiguous and on the CPU: as many elements as are wanted.
            cursors: Where the caller stands in the random streams.
        """
        only = self._only_read() or self._only_joined()
        if only is not None:
            # It needs no cache, or what it consists of sees to that.
            only.apply(start - only.start, out, cursors)
            return
        # What is only drawn needs no cache, and torch never splits it; so threads meet in Python less often.
        is_drawn = len(self.writes) == 1 and isinstance(self.writes[0], Drawn)
        step = 4 * CHUNK_NUMEL if is_drawn else CHUNK_NUMEL
        block = step * _CHUNKS_PER_BLOCK
        for first in range(0, out.numel(), block):
            last = min(out.numel(), first + block)
            writes = [write for write in self.writes if write.start < start + last and start + first < write.stop]
            for begin in range(first, last, step):
                self.make_chunk(start + begin, out[begin : min(last, begin + step)], cursors, writes)

    def make_chunk(self, start: int, out: Tensor, cursors: Cursors, writes: list[Write] | None = None) -> None:
        """Make a range in one go, by those of `writes` that concern it; see `make`."""
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
        """Return what is given, where that and a cast is all there is."""
        only = self._only_read()
        whole = only is not None and only.first == 0 and math.prod(only.given.shape) == self.numel
        return only.given if only is not None and whole else None

    def _only_read(self) -> Read | None:
        """Return the write that is all there is, if it is a read of the whole."""
        write = self.writes[0]
        whole = len(self.writes) == 1 and isinstance(write, Read) and (write.start, write.stop) == (0, self.numel)
        return write if whole else None  # type: ignore[return-value]

    def _only_joined(self) -> Joined | None:
        write = self.writes[0]
        whole = len(self.writes) == 1 and isinstance(write, Joined) and (write.start, write.stop) == (0, self.numel)
        return write if whole else None  # type: ignore[return-value]

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
        for write in self.writes:
            if isinstance(write, Copied) and isinstance(write.source, Constant):
                yield write.source
            for source in _sources(write):
                yield from source.pieces._constants()

    def _reads(self) -> Iterator[Read]:
        for write in self.writes:
            if isinstance(write, Read):
                yield write
            for source in _sources(write):
                yield from source.pieces._reads()

    def _positions(self) -> Iterator[Position]:
        for write in self.writes:
            if isinstance(write, Drawn):
                yield write.position
            for source in _sources(write):
                yield from source.pieces._positions()


def _sources(write: Write) -> Sequence[Source]:
    if isinstance(write, Joined):
        return write.sources
    if isinstance(write, Copied):
        return [write.source] if isinstance(write.source, Source) else []
    return [arg for arg in write.args if isinstance(arg, Source)] if isinstance(write, Computed) else []
