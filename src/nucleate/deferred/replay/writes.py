"""Writes: what one step does to a range of a storage, and where it reads from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nucleate.deferred.elements.source import Given, take_range
from nucleate.deferred.randomness.cursors import Cursors
from nucleate.deferred.randomness.fills import Fill
from nucleate.deferred.randomness.program import RandomProgram
from nucleate.deferred.replay.strided import grain, read_strided
from nucleate.deferred.tape.steps import Constant, Position

#: Elements that are made at a time: they stay in the second-level cache, and torch does not split the work over
#: threads of its own (`at::internal::GRAIN_SIZE`).
CHUNK_NUMEL = 1 << 15
#: Elements that go through a buffer at a time.
BUFFER_NUMEL = 1 << 18

# Longer rows are laid one by one.
_LONG_ROW_NUMEL = 1 << 12


class RangedStorage(ABC):
    """A storage of which ranges are made, as those see it who read it. `Pieces` is the only one.

    Attributes:
        program: The random program of its tape; None where nothing is drawn.
        numel: How many elements it has.
        dtype: Of which dtype.
        writes: What is done to it, in order.
        is_moved: Whether elements are only moved, cast and filled in, so that ranges of any size are made in one go.
        grain: How many elements should be made at a time, so that files are read in long runs.
    """

    __slots__ = ()

    program: RandomProgram | None
    numel: int
    dtype: torch.dtype
    writes: list[Write]
    is_moved: bool
    grain: int

    @abstractmethod
    def make(self, start: int, out: Tensor, cursors: Cursors) -> None:
        """Make the elements from `start` on.

        Args:
            start: The first element.
            out: One-dimensional, contiguous and on the CPU: as many elements as are wanted.
            cursors: Where the caller stands in the random streams.
        """

    @abstractmethod
    def make_chunk(self, start: int, out: Tensor, cursors: Cursors, writes: list[Write] | None = None) -> None:
        """Make a range in one go, by those of `writes` that concern it; see `make`."""

    @abstractmethod
    def cast(self, start: int, out: Tensor, cursors: Cursors) -> None:
        """Make the elements from `start` on, cast to the dtype of `out`; else like `make`."""

    @abstractmethod
    def given(self) -> Given | None:
        """Return what is given, where that and a cast is all there is."""

    @abstractmethod
    def order(self, start: int) -> tuple[int, int]:
        """Return a key by which parts are made in the order of the random stream, and those of files behind them."""

    @abstractmethod
    def prepare(self) -> None:
        """Execute the steps that the states it begins at depend on, so that threads need not."""

    @abstractmethod
    def all_writes(self, seen: set[int]) -> Iterator[Write]:
        """Yield the writes, and those of what is read, each once."""


class Derived(Given):
    """Elements that are those of another storage, of which ranges are made."""

    @abstractmethod
    def source(self) -> Source | None:
        """Return where the elements come from, or None where ranges cannot be made there."""


@dataclass(slots=True)
class Source:
    """A tensor on another storage, as wide as the write that reads it.

    Attributes:
        pieces: Makes the storage.
        start: The tensor's first element there.
        size: The tensor's size, where its elements do not follow one another.
        stride: Its strides, likewise.
    """

    pieces: RangedStorage
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
            step = 1 if row_numel >= _LONG_ROW_NUMEL else max(1, BUFFER_NUMEL // row_numel)
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
        source = derived_source(self.given)
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


def sources_of(write: Write) -> Sequence[Source]:
    """Return what a write reads from other storages."""
    if isinstance(write, Joined):
        return write.sources
    if isinstance(write, Copied):
        return [write.source] if isinstance(write.source, Source) else []
    if isinstance(write, Read):
        source = derived_source(write.given)
        return [] if source is None else [source]
    return [arg for arg in write.args if isinstance(arg, Source)] if isinstance(write, Computed) else []


def derived_source(given: Given) -> Source | None:
    """Return where given elements come from, if ranges of them are made there."""
    return given.source() if isinstance(given, Derived) else None


def dtype_of(write: Write | None) -> torch.dtype | None:
    """Return the dtype of what a write reads from one place."""
    if isinstance(write, Read):
        return write.given.dtype
    if not isinstance(write, Copied):
        return None
    return write.source.tensor.dtype if isinstance(write.source, Constant) else write.source.pieces.dtype


def grain_of(write: Write) -> int:
    """Return how many elements a write should make at a time, so that files are read in long runs."""
    grains = [source.grain for source in sources_of(write)]
    if not grains or not isinstance(write, Joined):
        return max(grains, default=1)
    # As many rows of each as it wants.
    widths = [last - first for first, last in zip(write.bounds, write.bounds[1:], strict=False)]
    return max(
        1 if each == 1 else each * write.width // max(1, width) for each, width in zip(grains, widths, strict=True)
    )
