"""Writes: the effects of single steps on ranges of a storage, and the sources that they read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nucleate.deferred.elements.element_source import ElementSource, fill_range_from
from nucleate.deferred.randomness.fills import Fill
from nucleate.deferred.randomness.program import RandomProgram
from nucleate.deferred.randomness.stream_cursors import StreamCursors
from nucleate.deferred.replay.strided import grain, read_strided
from nucleate.deferred.tape.steps import Constant, Position

#: Elements that are made at a time: they stay in the second-level cache, and torch does not split the work over
#: threads of its own (`at::internal::GRAIN_SIZE`).
CHUNK_NUMEL = 1 << 15
#: Elements that go through a buffer at a time.
BUFFER_NUMEL = 1 << 18

# Longer rows are read one by one.
_LONG_ROW_NUMEL = 1 << 12


class RangedStorage(ABC):
    """The interface of a range maker for the code that reads it. `RangeMaker` is the only subclass.

    Attributes:
        program: The random program of the storage's tape, or None if nothing is drawn.
        numel: The number of elements.
        dtype: The dtype of the elements.
        writes: The writes to the storage, in order.
        is_moved: Whether elements are only moved, cast and filled in, so that a range of any size is made at once.
        grain: The number of elements that should be made at a time, so that files are read in long runs.
    """

    __slots__ = ()

    program: RandomProgram | None
    numel: int
    dtype: torch.dtype
    writes: list[Write]
    is_moved: bool
    grain: int

    @abstractmethod
    def make(self, start: int, out: Tensor, cursors: StreamCursors) -> None:
        """Make the elements from `start` on.

        Args:
            start: The first element.
            out: The memory for the wanted elements, one-dimensional, contiguous and on the CPU.
            cursors: The caller's places in the random streams.
        """

    @abstractmethod
    def make_chunk(self, start: int, out: Tensor, cursors: StreamCursors, writes: list[Write] | None = None) -> None:
        """Make a range at once, by those of `writes` that concern it; see `make`."""

    @abstractmethod
    def cast(self, start: int, out: Tensor, cursors: StreamCursors) -> None:
        """Make the elements from `start` on, cast to the dtype of `out`; see `make`."""

    @abstractmethod
    def given(self) -> ElementSource | None:
        """Return the element source, if the elements are only read from it and cast; else None."""

    @abstractmethod
    def order(self, start: int) -> tuple[int, int]:
        """Return a sort key that puts parts in the order of the random stream, and parts of files behind them."""

    @abstractmethod
    def prepare(self) -> None:
        """Find the generator states where its fills begin, which may execute steps, so that threads need not do it."""

    @abstractmethod
    def all_writes(self, seen: set[int]) -> Iterator[Write]:
        """Yield the writes, and the writes of the storages that they read, each once."""


class Derived(ElementSource):
    """An element source whose elements are those of a storage with a range maker."""

    @abstractmethod
    def source(self) -> TensorView | None:
        """Return the view that the elements come from, or None if its ranges cannot be made."""


@dataclass(slots=True)
class TensorView:
    """A tensor on another storage, with one element for each element of the write that reads it.

    Attributes:
        maker: The range maker of the storage.
        start: The tensor's first element in the storage.
        size: The tensor's size, or None if its elements are consecutive.
        stride: The tensor's strides, if it has a size here.
    """

    maker: RangedStorage
    start: int
    size: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()

    @property
    def grain(self) -> int:
        """The number of elements that should be read at a time."""
        if self.size is None:
            return self.maker.grain
        return max(self.maker.grain, grain(self.size, self.stride, self.maker.dtype.itemsize))

    def read(self, begin: int, numel: int, cursors: StreamCursors) -> Tensor:
        out = torch.empty(numel, dtype=self.maker.dtype, device="cpu")
        if self.size is None:
            self.maker.make_chunk(self.start + begin, out, cursors)
        else:
            self.into(begin, out, cursors)
        return out

    def into(self, begin: int, out: Tensor, cursors: StreamCursors) -> None:
        """Read a range, cast to the dtype of `out`.

        Args:
            begin: The first wanted element.
            out: One-dimensional and contiguous; or two-dimensional of any strides, with the rows of the tensor up to
                one of its dims.
            cursors: The caller's places in the random streams.
        """
        if self.size is not None:
            make, maker = self.maker.make, self.maker
            read_strided(
                lambda start, held: make(start, held, cursors),
                maker.dtype, self.start, self.size, self.stride, begin, out,
            )  # fmt: skip
        elif out.dim() == 1:
            self.maker.cast(self.start + begin, out, cursors)
        else:
            num_rows, row_numel = out.shape
            step = 1 if row_numel >= _LONG_ROW_NUMEL else max(1, BUFFER_NUMEL // row_numel)
            for row in range(0, num_rows, step):
                part = out[row : row + step]
                start = self.start + begin + row * row_numel
                if part.is_contiguous():
                    self.maker.cast(start, part.view(-1), cursors)
                    continue
                held = torch.empty(part.numel(), dtype=out.dtype, device="cpu")
                self.maker.cast(start, held, cursors)
                part.copy_(held.view(part.shape))


@dataclass(slots=True)
class Write:
    """The effect of one step on a range of a storage.

    Attributes:
        start: The first element of the range.
        stop: The element behind the range.
        blind: Whether the step replaces the whole range without reading it.
    """

    start: int
    stop: int
    blind: bool

    def apply(self, begin: int, out: Tensor, cursors: StreamCursors) -> None:
        """Write to `out`, which begins `begin` elements behind `start`."""
        raise NotImplementedError


@dataclass(slots=True)
class Drawn(Write):
    """A random fill."""

    fill: Fill
    position: Position

    def apply(self, begin: int, out: Tensor, cursors: StreamCursors) -> None:
        self.fill.make(begin, out, lambda offset, count: cursors.seek(self.position, offset, count))


@dataclass(slots=True)
class Filled(Write):
    """One value for all elements."""

    value: Any

    def apply(self, begin: int, out: Tensor, cursors: StreamCursors) -> None:
        out.fill_(self.value)


@dataclass(slots=True)
class Copied(Write):
    """Elements of another storage, or of a real tensor, cast."""

    source: TensorView | Constant

    def apply(self, begin: int, out: Tensor, cursors: StreamCursors) -> None:
        if isinstance(self.source, Constant):
            out.copy_(self.source.tensor.detach().view(-1)[begin : begin + out.numel()])
        elif self.source.maker.is_moved:
            self.source.into(begin, out, cursors)
        else:
            for first in range(0, out.numel(), CHUNK_NUMEL):
                part = out[first : first + CHUNK_NUMEL]
                part.copy_(self.source.read(begin + first, part.numel(), cursors))


@dataclass(slots=True)
class Read(Write):
    """Elements of an element source, cast."""

    given: ElementSource
    # The element of the element source that is written first.
    first: int = 0

    def apply(self, begin: int, out: Tensor, cursors: StreamCursors) -> None:
        source = derived_source(self.given)
        if source is None:
            fill_range_from(out, self.given, self.first + begin)
        else:
            source.into(self.first + begin, out, cursors)


@dataclass(slots=True)
class Joined(Write):
    """Several tensors side by side, as in `cat` and `stack`; or tensors in some columns, where the other columns stay.

    Attributes:
        sources: The tensors, in order.
        bounds: The first column of each tensor within a row of the range, and the column behind the last tensor.
        width: The number of columns of a row.
    """

    sources: Sequence[TensorView]
    bounds: Sequence[int]
    width: int

    def apply(self, begin: int, out: Tensor, cursors: StreamCursors) -> None:
        done = 0
        # `start` is the first element of a row.
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

    def apply(self, begin: int, out: Tensor, cursors: StreamCursors) -> None:
        args = [arg.read(begin, out.numel(), cursors) if isinstance(arg, TensorView) else arg for arg in self.args]
        if self.blind:
            out.copy_(self.func(*args, **self.kwargs))
        else:
            self.func(out, *args, **self.kwargs)


def sources_of(write: Write) -> Sequence[TensorView]:
    """Return the tensors on other storages that a write reads."""
    if isinstance(write, Joined):
        return write.sources
    if isinstance(write, Copied):
        return [write.source] if isinstance(write.source, TensorView) else []
    if isinstance(write, Read):
        source = derived_source(write.given)
        return [] if source is None else [source]
    return [arg for arg in write.args if isinstance(arg, TensorView)] if isinstance(write, Computed) else []


def derived_source(given: ElementSource) -> TensorView | None:
    """Return the view that an element source reads from a storage, or None if it does not read a storage in ranges."""
    return given.source() if isinstance(given, Derived) else None


def dtype_of(write: Write | None) -> torch.dtype | None:
    """Return the dtype that a write reads from one place, or None if it does anything else."""
    if isinstance(write, Read):
        return write.given.dtype
    if not isinstance(write, Copied):
        return None
    return write.source.tensor.dtype if isinstance(write.source, Constant) else write.source.maker.dtype


def grain_of(write: Write) -> int:
    """Return the number of elements that a write should make at a time, so that files are read in long runs."""
    grains = [source.grain for source in sources_of(write)]
    if not grains or not isinstance(write, Joined):
        return max(grains, default=1)
    # Each source gets as many rows as it wants.
    widths = [last - first for first, last in zip(write.bounds, write.bounds[1:], strict=False)]
    return max(
        1 if each == 1 else each * write.width // max(1, width) for each, width in zip(grains, widths, strict=True)
    )
