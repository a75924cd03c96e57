"""Computed sources: a deferred tensor as an element source, such as tensors of a file joined, split or transposed.

Torch code on deferred tensors describes the change; its result is read in ranges from a computed source. So a loader
that renames and joins tensors needs no code of its own for that, and a rank that keeps a part of the result reads only
that part.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from nucleate.deferred.active import turn
from nucleate.deferred.elements.element_source import ElementSource
from nucleate.deferred.guards.handle import handle_of
from nucleate.deferred.guards.refusals import refuse_stale
from nucleate.deferred.randomness.stream_cursors import StreamCursors
from nucleate.deferred.record import Record, record_of
from nucleate.deferred.replay.live_writes import source_of
from nucleate.deferred.replay.ranges import RangeMaker
from nucleate.deferred.replay.replayer import Replayer, backward_slice, view
from nucleate.deferred.replay.writes import Copied, Derived, RangedStorage, TensorView
from nucleate.deferred.tape.steps import Constant, TensorRef


class ComputedSource(Derived):
    """The elements of a deferred tensor as they are now. Later writes to the tensor do not count.

    If the tensor can be made in ranges, a read makes only its range. Else the first read makes the whole tensor, which
    is kept until its last element was read.

    Args:
        tensor: A deferred tensor, guarded or still being recorded.

    Raises:
        DeferredEditError: The tensor was edited while nothing recorded it.
    """

    def __init__(self, tensor: Tensor) -> None:
        record = record_of(tensor)
        assert record is not None, "not a deferred tensor"
        handle = handle_of(tensor)
        if handle is not None:
            refuse_stale(tensor, handle)
        self._record: Record = record
        self._lock = threading.Lock()
        self._local = threading.local()
        self._whole: TensorView | None = None
        self._num_read = 0
        self._description = ""
        # Now and not at a read: threads read, and their parent may hold the turn meanwhile.
        with turn, torch._C.DisableTorchFunction(), _disable_current_modes(), record.making():
            self._ref = ref = record.tape.ref(tensor)
            self._storage = record.tape.storage(ref.storage)
            writers = record.tape.writers(ref.storage)
            # The step and not its index: a tape that joins another tape renumbers its steps and storages.
            self._last = record.tape.steps[writers[-1]] if writers else None
            self.dtype, self.shape = ref.dtype, ref.size
            end = self._end()
            self._source = source_of(record.tape, record.replayer.random, ref, end)
            if self._source is None:
                steps = backward_slice(record.tape, [ref.storage], end)
                if any(step.position is not None for step in steps):
                    # The numbers come from generators that other threads must not touch.
                    self._source = _in_memory(record.replayer.contents(steps, [ref.storage])[ref.storage], ref)

    def read(self, start: int, out: Tensor) -> None:
        if self._source is not None:
            self._source.into(start, out, self._cursors(self._source.maker))
            return
        with self._lock:
            whole = self._whole = self._whole or self._made_whole()
        whole.into(start, out, StreamCursors(None))
        with self._lock:
            self._num_read += out.numel()
            if self._num_read >= self._ref.numel:
                # A second read makes the tensor again.
                self._whole, self._num_read = None, 0

    def order(self, start: int) -> tuple[int, int]:
        if self._source is None:
            return (0, start)
        return self._source.maker.order(self._source.start + (start if self._source.size is None else 0))

    def describe(self) -> str:
        if not self._description:
            with turn:
                ref, tape, numbers = self._now(), self._record.tape, dict[int, int]()
                digest = tape.digest(backward_slice(tape, [ref.storage], self._end()), numbers)
                number = numbers.setdefault(ref.storage, len(numbers))
                self._description = f"computed {digest} {replace(ref, storage=number)}"
        return self._description

    def check_unchanged(self) -> None:
        with turn:
            ref, tape = self._now(), self._record.tape
            for given in tape.givens(backward_slice(tape, [ref.storage], self._end())):
                given.check_unchanged()

    def memory(self) -> torch.UntypedStorage | None:
        given = self.given()
        return None if given is None else given.memory()

    def given(self) -> ElementSource | None:
        """Return the element source whose elements the tensor has, neither moved nor cast, or None."""
        source = self._source
        if source is None or source.size is not None or source.start or source.maker.numel != self._ref.numel:
            return None
        given = source.maker.given()
        same = given is not None and given.dtype == self.dtype and tuple(given.shape) == self.shape
        return given if same else None

    def source(self) -> TensorView | None:
        # A source that draws random numbers needs its own cursors.
        return self._source if self._source is not None and self._source.maker.is_moved else None

    def _now(self) -> TensorRef:
        """Return the tensor with the number that its storage has on the tape now."""
        with torch._C.DisableTorchFunction():
            meta = torch.empty(0, dtype=torch.uint8, device="meta").set_(self._storage)
        number = self._record.tape.number(meta)
        assert number is not None
        return replace(self._ref, storage=number)

    def _end(self) -> int:
        """Return the index behind the last step that counts."""
        return self._last.index + 1 if self._last is not None else 0

    def _cursors(self, maker: RangedStorage) -> StreamCursors:
        cursors: StreamCursors | None = getattr(self._local, "cursors", None)
        if cursors is None:
            cursors = self._local.cursors = StreamCursors(maker.program)
        return cursors

    def _made_whole(self) -> TensorView:
        # Not by the recording's own replayer: nothing is drawn, so other threads need not wait.
        tape, ref = self._record.tape, self._now()
        steps = backward_slice(tape, [ref.storage], self._end())
        return _in_memory(Replayer(tape, self._record.device).contents(steps, [ref.storage])[ref.storage], ref)


def _in_memory(storage: torch.UntypedStorage, ref: TensorRef) -> TensorView:
    # Values that a device has made are read on the host.
    flat = view(storage, ref).resolve_conj().resolve_neg().reshape(-1).cpu()
    write = Copied(0, flat.numel(), True, Constant(flat))
    return TensorView(RangeMaker(None, flat.numel(), ref.dtype, [write]), 0)
