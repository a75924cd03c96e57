"""Range makers: objects that make any range of one storage without the rest of the storage.

Most of a model's memory is a random fill, or a constant, and a few operations on each element by itself. From such a
storage, a rank makes only its own shard, several threads make one parameter, and a chain of operations runs while a
chunk is in the cache. Operations that only move elements of files (joins, splits, transposes) run on large ranges
instead, so that files are read in long runs. `live_writes.py` finds these storages on the tape. All other storages are
replayed whole (`replayer.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nucleate.deferred.elements.element_source import ElementSource
from nucleate.deferred.randomness.program import RandomProgram
from nucleate.deferred.randomness.stream_cursors import StreamCursors
from nucleate.deferred.replay.writes import (
    BUFFER_NUMEL,
    CHUNK_NUMEL,
    Copied,
    Drawn,
    Filled,
    Joined,
    RangedStorage,
    Read,
    TensorView,
    Write,
    derived_source,
    dtype_of,
    grain_of,
    sources_of,
)
from nucleate.deferred.tape.steps import Constant, Position

# The writes that concern a chunk are looked up for this many chunks at once.
_CHUNKS_PER_BLOCK = 32
# A number that is larger than the number of any run.
_BEHIND_DRAWN = 1 << 48


@dataclass(slots=True)
class RangeMaker(RangedStorage):
    """A range maker of one storage.

    Attributes:
        program: The random program of the storage's tape, or None if nothing is drawn.
        numel: The number of elements.
        dtype: The dtype of the elements.
        writes: The writes to the storage, in order.
    """

    program: RandomProgram | None
    numel: int
    dtype: torch.dtype
    writes: list[Write]
    #: Whether elements are only moved, cast and filled in, so that a range of any size is made at once.
    is_moved: bool = field(init=False)
    #: The number of elements that should be made at a time, so that files are read in long runs.
    grain: int = field(init=False)

    def __post_init__(self) -> None:
        """Set `is_moved` and `grain` from the writes."""
        self.is_moved = all(
            isinstance(write, (Filled, Read, Copied, Joined))
            and all(source.maker.is_moved for source in sources_of(write))
            for write in self.writes
        )
        self.grain = max((grain_of(write) for write in self.writes), default=1)

    @classmethod
    def of(cls, given: ElementSource, dtype: torch.dtype) -> RangeMaker:
        """Return a range maker of the elements of an element source, cast to a dtype."""
        numel = math.prod(given.shape)
        return cls(None, numel, dtype, [Read(0, numel, True, given)])

    def make(self, start: int, out: Tensor, cursors: StreamCursors) -> None:
        only = self._only()
        if self.is_moved or isinstance(only, Joined):
            # Chunks would not help, or the joined sources use chunks themselves.
            self.make_chunk(start, out, cursors)
            return
        # A fill alone does not need the cache, and torch never splits it. Longer steps let threads meet in Python less.
        step = 4 * CHUNK_NUMEL if isinstance(only, Drawn) else CHUNK_NUMEL
        block = step * _CHUNKS_PER_BLOCK
        for first in range(0, out.numel(), block):
            last = min(out.numel(), first + block)
            writes = [write for write in self.writes if write.start < start + last and start + first < write.stop]
            for begin in range(first, last, step):
                self.make_chunk(start + begin, out[begin : min(last, begin + step)], cursors, writes)

    def cast(self, start: int, out: Tensor, cursors: StreamCursors) -> None:
        only = self._only()
        if out.dtype == self.dtype:
            self.make(start, out, cursors)
        elif self.is_moved and (isinstance(only, Joined) or dtype_of(only) == self.dtype):
            # The write casts while it reads.
            assert only is not None
            only.apply(start - only.start, out, cursors)
        else:
            buffer = torch.empty(min(out.numel(), BUFFER_NUMEL), dtype=self.dtype, device="cpu")
            for first in range(0, out.numel(), BUFFER_NUMEL):
                part = out[first : first + BUFFER_NUMEL]
                held = buffer[: part.numel()]
                self.make(start + first, held, cursors)
                part.copy_(held)

    def make_chunk(self, start: int, out: Tensor, cursors: StreamCursors, writes: list[Write] | None = None) -> None:
        stop = start + out.numel()
        for write in self.writes if writes is None else writes:
            begin, end = max(start, write.start), min(stop, write.stop)
            if begin < end:
                write.apply(begin - write.start, out[begin - start : end - start], cursors)

    def memory(self) -> torch.UntypedStorage | None:
        """Return memory that already has the whole content and may become the storage itself, or None."""
        given = self.given()
        return None if given is None or given.dtype != self.dtype else given.memory()

    def given(self) -> ElementSource | None:
        only = self._only()
        if not isinstance(only, Read) or only.first or math.prod(only.given.shape) != self.numel:
            return None
        return only.given

    def viewed(self) -> TensorView | None:
        """Return the view that has the same elements in the same order, or None if the writes do more than read it."""
        only = self._only()
        if isinstance(only, Copied) and isinstance(only.source, TensorView):
            source: TensorView | None = only.source
        else:
            source = derived_source(only.given) if isinstance(only, Read) and not only.first else None
        return source if source is not None and source.maker.dtype == self.dtype else None

    def box(self, shape: Sequence[int], offsets: Sequence[int], size: Sequence[int]) -> RangeMaker | None:
        """Return a range maker of a box of the contiguous tensor, or None if the rest would have to be read too.

        Args:
            shape: The tensor's shape. The tensor has all elements of the storage.
            offsets: The box's first index in each dim.
            size: The box's size.
        """
        source = self.viewed()
        if source is None or source.size is None or not source.maker.is_moved or math.prod(shape) != self.numel:
            return None
        try:
            view = torch.empty_strided(source.size, source.stride, device="meta").view(tuple(shape))
        except RuntimeError:
            return None
        start = source.start + sum(place * step for place, step in zip(offsets, view.stride(), strict=True))
        numel = math.prod(size)
        part = TensorView(source.maker, start, tuple(size), view.stride())
        return RangeMaker(self.program, numel, self.dtype, [Copied(0, numel, True, part)])

    def constant(self) -> bool | int | float | None:
        """Return the number that all elements are equal to, or None if they differ or are not known."""
        only = self._only()
        return only.value if isinstance(only, Filled) else None

    def uncast(self) -> RangeMaker:
        """Return a range maker without the cast, if elements are only read from one place and cast; else this one."""
        only = self._only()
        dtype = dtype_of(only)
        if only is None or dtype is None or dtype == self.dtype:
            return self
        return RangeMaker(self.program, self.numel, dtype, [only])

    @property
    def is_on_host(self) -> bool:
        """Whether elements are only moved, cast and filled in, and all their sources are on the host."""
        return self.is_moved and all(constant.tensor.device.type == "cpu" for constant in self._constants())

    def _only(self) -> Write | None:
        """Return the only write, if there is one write and it covers the whole storage; else None."""
        write = self.writes[0]
        return write if len(self.writes) == 1 and (write.start, write.stop) == (0, self.numel) else None

    def order(self, start: int) -> tuple[int, int]:
        """Return a sort key that puts parts in the order of the random stream, and parts of files behind them.

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
        """Tell the element sources how many elements will be read."""
        for read in self._reads():
            read.given.expect(min(numel, math.prod(read.given.shape)))

    @property
    def is_far(self) -> bool:
        """Whether the making of elements waits for something slow, such as a disk."""
        return any(read.given.is_far() for read in self._reads())

    @property
    def is_read(self) -> bool:
        """Whether the elements are only read from one element source and cast."""
        return isinstance(self._only(), Read)

    def prepare(self) -> None:
        """Find the generator states where its fills begin, which may execute steps, so that threads need not do it.

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
                yield from source.maker.all_writes(seen)
