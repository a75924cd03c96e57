"""Parts: what of a storage this rank makes, as ranges of its elements, and the threads that make them.

A shard is a box of a tensor. Where its rows are long, each is made straight into its place. Where they are short, as
in a shard of the last dimension, some whole rows at a time are made in a small buffer and their middle is kept, which
costs the draws of all.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from nucleate.materialize.source import Cursors, Pieces
from nucleate.report.meter import Meter

#: Shorter ranges are cut out of whole rows.
MIN_RANGE_NUMEL = 1 << 12
#: Elements of the buffer for that.
BUFFER_NUMEL = 1 << 18
#: Less work than this is done by one thread.
MIN_NUMEL_PER_THREAD = 1 << 20

# Threads take their next stretch of the stream when they are done with one, so that a slow one does less.
_STRETCHES_PER_THREAD = 6


@dataclass(frozen=True, slots=True)
class Part(ABC):
    """A part of a storage that is made.

    Attributes:
        pieces: Makes it.
        start: The first element of the storage that is made.
    """

    pieces: Pieces
    start: int

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """How large what is made is."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Into how many rows it can be cut."""

    @property
    @abstractmethod
    def row_numel(self) -> int:
        """How many elements of the storage are passed over or made for each row."""

    @abstractmethod
    def cut(self, first: int, last: int) -> Part:
        """Return the rows from `first` to `last`."""

    @abstractmethod
    def make(self, cursors: Cursors) -> None:
        """Make it."""


@dataclass(frozen=True, slots=True)
class Range(Part):
    """Elements that follow one another in the storage, into memory where they do as well.

    Attributes:
        out: Where they go.
    """

    out: Tensor

    @property
    def size_bytes(self) -> int:
        return self.out.numel() * self.out.element_size()

    @property
    def num_rows(self) -> int:
        return self.out.numel()

    @property
    def row_numel(self) -> int:
        return 1

    def cut(self, first: int, last: int) -> Part:
        return Range(self.pieces, self.start + first, self.out[first:last])

    def make(self, cursors: Cursors) -> None:
        self.pieces.make(self.start, self.out, cursors)


@dataclass(frozen=True, slots=True)
class Columns(Part):
    """The same columns of a number of rows.

    Attributes:
        out: Where they go.
        width: How long a whole row is.
        column: The first column wanted.
    """

    out: Tensor
    width: int
    column: int

    @property
    def size_bytes(self) -> int:
        return self.out.numel() * self.out.element_size()

    @property
    def num_rows(self) -> int:
        return self.out.shape[0]

    @property
    def row_numel(self) -> int:
        return self.width

    def cut(self, first: int, last: int) -> Part:
        return Columns(self.pieces, self.start + first * self.width, self.out[first:last], self.width, self.column)

    def make(self, cursors: Cursors) -> None:
        step = max(1, BUFFER_NUMEL // self.width)
        buffer = torch.empty(min(step, self.num_rows), self.width, dtype=self.pieces.dtype, device="cpu")
        for row in range(0, self.num_rows, step):
            rows = buffer[: self.num_rows - row]
            self.pieces.make(self.start + row * self.width, rows.view(-1), cursors)
            self.out[row : row + step].copy_(rows[:, self.column : self.column + self.out.shape[1]])


def parts_of(pieces: Pieces, base: int, shape: Sequence[int], offsets: Sequence[int], out: Tensor) -> Iterator[Part]:
    """Cut a box out of a contiguous tensor on a storage.

    Args:
        pieces: Makes the storage.
        base: Where the tensor begins in it.
        shape: The tensor's shape.
        offsets: The box's first index in each dimension.
        out: Contiguous, of the box's shape.
    """
    if not out.numel():
        return
    whole, first, size = merged(shape, offsets, out.shape)
    box = pieces.box(shape, offsets, out.shape) if len(whole) > 1 and base == 0 else None
    if box is not None:
        yield Range(box, 0, out.view(-1))
        return
    if len(whole) == 1:
        yield Range(pieces, base + first[0], out.view(-1))
        return
    inner = math.prod(whole[1:])
    rows = out.view(size)
    if len(whole) == 2 and size[1] < MIN_RANGE_NUMEL and inner <= BUFFER_NUMEL:
        yield Columns(pieces, base + first[0] * inner, rows, inner, first[1])
        return
    for row in range(size[0]):
        yield from parts_of(pieces, base + (first[0] + row) * inner, whole[1:], first[1:], rows[row])


def merged(
    shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Merge dimensions that the box covers into the one before them."""
    whole, first, size = [1], [0], [1]
    for length, offset, wanted in zip(shape, offsets, sizes, strict=True):
        covers = wanted == length
        if covers or whole[-1] == 1:
            whole[-1], first[-1], size[-1] = whole[-1] * length, first[-1] * length + offset, size[-1] * wanted
        else:
            whole.append(length)
            first.append(offset)
            size.append(wanted)
    return whole, first, size


def make_parts(parts: Sequence[Part], num_threads: int) -> None:
    """Make parts, in the order of the random streams and files, by several threads.

    Args:
        parts: They must not overlap where they go.
        num_threads: How many threads at most.
    """
    ordered = sorted(parts, key=lambda part: part.pieces.order(part.start))
    total = sum(part.num_rows * part.row_numel for part in ordered)
    num_threads = max(1, min(num_threads, total // MIN_NUMEL_PER_THREAD))
    with Meter(sum(part.size_bytes for part in ordered), "making parameters") as meter:
        _make_all(ordered, total, num_threads, meter)


def _make_all(ordered: Sequence[Part], total: int, num_threads: int, meter: Meter) -> None:
    if num_threads == 1:
        _make(ordered, meter)
        return
    stretches = list(_stretches(ordered, total, num_threads * _STRETCHES_PER_THREAD))
    # A mode of torch's holds for one thread, and an inference tensor may only be written in that mode.
    inference = torch.is_inference_mode_enabled()

    def make(stretch: Sequence[Part]) -> None:
        with torch.inference_mode(inference):
            _make(stretch, meter)

    with ThreadPoolExecutor(num_threads, thread_name_prefix="nucleate-materialize") as pool:
        try:
            for done in [pool.submit(make, stretch) for stretch in stretches]:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _make(parts: Sequence[Part], meter: Meter) -> None:
    every: dict[object, Cursors] = {}
    for part in parts:
        program = part.pieces.program
        if program not in every:
            every[program] = Cursors(program)
        part.make(every[program])
        meter.add(part.size_bytes)
    for cursors in every.values():
        cursors.remember()


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
