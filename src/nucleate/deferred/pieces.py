"""Pieces: a storage of which any range of elements can be made alone.

Most of a model's memory is a random fill, or a constant, and a few operations on each element by itself. Of such a
storage a rank makes its own shard and nothing else, several threads make one parameter, and a chain of operations
runs while a chunk of it is in the cache. What only moves elements of files (joins, splits, transposes) runs on large
ranges instead, so that files are read in long runs. Which storages are such, `live_writes.py` reads from the tape; the
others are replayed whole (`replay.py`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nucleate.deferred.cursors import Cursors
from nucleate.deferred.fills import Fill
from nucleate.deferred.given import Given, take_range
from nucleate.deferred.random_program import Position, RandomProgram
from nucleate.deferred.strided import grain, read_strided
from nucleate.deferred.tape import Constant

#: Elements that are made at a time: they stay in the second-level cache, and torch does not split the work over
#: threads of its own (`at::internal::GRAIN_SIZE`).
CHUNK_NUMEL = 1 << 15

# Which writes concern a chunk is looked up for so many chunks at once.
_CHUNKS_PER_BLOCK = 32
# More than there are runs of random numbers.
_BEHIND_DRAWN = 1 << 48
# Elements that go through a buffer at a time.
_BUFFER_NUMEL = 1 << 18
# Longer rows are laid one by one.
_LONG_ROW_NUMEL = 1 << 12


@dataclass(slots=True)
class Source:
    """A tensor on another storage, as wide as the write that reads it.

    Attributes:
        pieces: Makes the storage.
        start: The tensor's first element there.
        size: The tensor's size, where its elements do not follow one another.
        stride: Its strides, likewise.
    """

    pieces: Pieces
    start: int
    size: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()

    @property
    def grain(self) -> int:
        """How many elements should be read at a time."""
        if self.size is None:
            return self.pieces.grain
        return max(self.pieces.grain, grain(self.size, self.stride, self.pieces.dtype.itemsize))

    def read(self, begin: int, numel: int, cursors: Cursors) -> Tensor:
        out = torch.empty(numel, dtype=self.pieces.dtype, device="cpu")
        if self.size is None:
            self.pieces.make_chunk(self.start + begin, out, cursors)
        else:
            self.into(begin, out, cursors)
        return out

    def into(self, begin: int, out: Tensor, cursors: Cursors) -> None:
        """Read a range, cast to the dtype of `out`.

        Args:
            begin: The first element that is wanted.
            out: One-dimensional and contiguous; or two-dimensional of any strides, where the rows are those of the
                tensor up to one of its dims.
            cursors: Where the caller stands in the random streams.
        """
        if self.size is not None:
            make, pieces = self.pieces.make, self.pieces
            read_strided(
                lambda start, held: make(start, held, cursors),
                pieces.dtype, self.start, self.size, self.stride, begin, out,
            )  # fmt: skip
        elif out.dim() == 1:
            self.pieces.cast(self.start + begin, out, cursors)
        else:
            num_rows, row_numel = out.shape
            step = 1 if row_numel >= _LONG_ROW_NUMEL else max(1, _BUFFER_NUMEL // row_numel)
            for row in range(0, num_rows, step):
                part = out[row : row + step]
                start = self.start + begin + row * row_numel
                if part.is_contiguous():
                    self.pieces.cast(start, part.view(-1), cursors)
                    continue
                held = torch.empty(part.numel(), dtype=out.dtype, device="cpu")
                self.pieces.cast(start, held, cursors)
                part.copy_(held.view(part.shape))


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
        elif self.source.pieces.is_moved:
            self.source.into(begin, out, cursors)
        else:
            for first in range(0, out.numel(), CHUNK_NUMEL):
                part = out[first : first + CHUNK_NUMEL]
                part.copy_(self.source.read(begin + first, part.numel(), cursors))


@dataclass(slots=True)
class Read(Write):
    """Elements that are given from elsewhere, cast."""

    given: Given
    # Which of its elements is the first that is written.
    first: int = 0

    def apply(self, begin: int, out: Tensor, cursors: Cursors) -> None:
        source = self.given.source()
        if source is None:
            take_range(out, self.given, self.first + begin)
        else:
            source.into(self.first + begin, out, cursors)


@dataclass(slots=True)
class Joined(Write):
    """Several tensors side by side, as `cat` and `stack` lay them; or in some columns only, between what is there.

    Attributes:
        sources: What lies where.
        bounds: Of each the first element within one row of the whole, and the one behind the last source.
        width: How long a row is.
    """

    sources: Sequence[Source]
    bounds: Sequence[int]
    width: int

    def apply(self, begin: int, out: Tensor, cursors: Cursors) -> None:
        done = 0
        # `start` is that of a row.
        while done < out.numel():
            row, column = divmod(begin + done, self.width)
            num_rows = (out.numel() - done) // self.width
            if not column and num_rows:
                rows = out[done : done + num_rows * self.width].view(num_rows, self.width)
                for source, first, last in zip(self.sources, self.bounds, self.bounds[1:], strict=False):
                    if last > first:
                        source.into(row * (last - first), rows[:, first:last], cursors)
                done += rows.numel()
                continue
            number = bisect_right(self.bounds, column) - 1
            if not 0 <= number < len(self.sources):
                bound = self.bounds[0] if number < 0 else self.width
                done = min(out.numel(), done + bound - column)
                continue
            first, last = self.bounds[number], self.bounds[number + 1]
            end = min(out.numel(), done + last - column)
            self.sources[number].into(row * (last - first) + column - first, out[done:end], cursors)
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
    #: Whether elements are only moved, cast and filled in, so that ranges of any size are made in one go.
    is_moved: bool = field(init=False)
    #: How many elements should be made at a time, so that files are read in long runs.
    grain: int = field(init=False)

    def __post_init__(self) -> None:
        """Look at the writes."""
        self.is_moved = all(
            isinstance(write, (Filled, Read, Copied, Joined))
            and all(source.pieces.is_moved for source in _sources(write))
            for write in self.writes
        )
        self.grain = max((_grain(write) for write in self.writes), default=1)

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
        """Make the elements from `start` on, cast to the dtype of `out`; else like `make`."""
        only = self._only()
        if out.dtype == self.dtype:
            self.make(start, out, cursors)
        elif self.is_moved and (isinstance(only, Joined) or _dtype_of(only) == self.dtype):
            # The cast happens where it is read.
            assert only is not None
            only.apply(start - only.start, out, cursors)
        else:
            buffer = torch.empty(min(out.numel(), _BUFFER_NUMEL), dtype=self.dtype, device="cpu")
            for first in range(0, out.numel(), _BUFFER_NUMEL):
                part = out[first : first + _BUFFER_NUMEL]
                held = buffer[: part.numel()]
                self.make(start + first, held, cursors)
                part.copy_(held)

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
            source = only.given.source() if isinstance(only, Read) and not only.first else None
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
        for write in self._all_writes(set()):
            if isinstance(write, Copied) and isinstance(write.source, Constant):
                yield write.source

    def _reads(self) -> Iterator[Read]:
        yield from (write for write in self._all_writes(set()) if isinstance(write, Read))

    def _positions(self) -> Iterator[Position]:
        yield from (write.position for write in self._all_writes(set()) if isinstance(write, Drawn))

    def _all_writes(self, seen: set[int]) -> Iterator[Write]:
        """Yield the writes, and those of what is read, each once."""
        if id(self) in seen:
            return
        seen.add(id(self))
        for write in self.writes:
            yield write
            for source in _sources(write):
                yield from source.pieces._all_writes(seen)


def _sources(write: Write) -> Sequence[Source]:
    if isinstance(write, Joined):
        return write.sources
    if isinstance(write, Copied):
        return [write.source] if isinstance(write.source, Source) else []
    if isinstance(write, Read):
        source = write.given.source()
        return [] if source is None else [source]
    return [arg for arg in write.args if isinstance(arg, Source)] if isinstance(write, Computed) else []


def _dtype_of(write: Write | None) -> torch.dtype | None:
    """Return the dtype of what a write reads from one place."""
    if isinstance(write, Read):
        return write.given.dtype
    if not isinstance(write, Copied):
        return None
    return write.source.tensor.dtype if isinstance(write.source, Constant) else write.source.pieces.dtype


def _grain(write: Write) -> int:
    grains = [source.grain for source in _sources(write)]
    if not grains or not isinstance(write, Joined):
        return max(grains, default=1)
    # As many rows of each as it wants.
    widths = [last - first for first, last in zip(write.bounds, write.bounds[1:], strict=False)]
    return max(
        1 if each == 1 else each * write.width // max(1, width) for each, width in zip(grains, widths, strict=True)
    )
