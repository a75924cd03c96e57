"""Elements that a deferred tensor holds, for others to read: a file's tensors joined, split or transposed.

Torch code on deferred tensors says what is done; what it makes of files is read from this in ranges. So a loader that
renames and joins tensors needs no way of its own to do it, and a rank that owns a part of the result reads that part.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from nucleate.deferred.active import turn
from nucleate.deferred.elements.source import Given
from nucleate.deferred.guards.handle import handle_of
from nucleate.deferred.guards.refusals import refuse_stale
from nucleate.deferred.randomness.cursors import Cursors
from nucleate.deferred.record import Record, record_of
from nucleate.deferred.replay.live_writes import source_of
from nucleate.deferred.replay.ranges import Pieces
from nucleate.deferred.replay.replayer import Replayer, backward_slice, view
from nucleate.deferred.replay.writes import Copied, Derived, RangedStorage, Source
from nucleate.deferred.tape.steps import Constant, TensorRef


class ComputedGiven(Derived):
    """The elements that a deferred tensor holds now. Later writes to the tensor do not count.

    Where it can be made in ranges, only the range that is read is made. Else the whole is made at the first read, and
    kept until its last element was read.

    Args:
        tensor: A deferred tensor, guarded or still being recorded.

    Raises:
        DeferredEditError: The tensor was edited where nothing recorded it.
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
        self._whole: Source | None = None
        self._num_read = 0
        self._description = ""
        # Now, not when it is read: threads read, and their parent may be holding the turn meanwhile.
        with turn, torch._C.DisableTorchFunction(), _disable_current_modes(), record.making():
            self._ref = ref = record.tape.ref(tensor)
            self._storage = record.tape.storage(ref.storage)
            writers = record.tape.writers(ref.storage)
            # The step itself: a tape that joins another one renumbers its steps and storages.
            self._last = record.tape.steps[writers[-1]] if writers else None
            self.dtype, self.shape = ref.dtype, ref.size
            end = self._end()
            self._source = source_of(record.tape, record.replayer.random, ref, end)
            if self._source is None:
                steps = backward_slice(record.tape, [ref.storage], end)
                if any(step.position is not None for step in steps):
                    # Its numbers come from generators that threads must not touch.
                    self._source = _in_memory(record.replayer.contents(steps, [ref.storage])[ref.storage], ref)

    def read(self, start: int, out: Tensor) -> None:
        if self._source is not None:
            self._source.into(start, out, self._cursors(self._source.pieces))
            return
        with self._lock:
            whole = self._whole = self._whole or self._made_whole()
        whole.into(start, out, Cursors(None))
        with self._lock:
            self._num_read += out.numel()
            if self._num_read >= self._ref.numel:
                # A second reading makes it again.
                self._whole, self._num_read = None, 0

    def order(self, start: int) -> tuple[int, int]:
        if self._source is None:
            return (0, start)
        return self._source.pieces.order(self._source.start + (start if self._source.size is None else 0))

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

    def given(self) -> Given | None:
        """Return what is given to the tensor from elsewhere, where the tensor is just that: nothing moved or cast."""
        source = self._source
        if source is None or source.size is not None or source.start or source.pieces.numel != self._ref.numel:
            return None
        given = source.pieces.given()
        same = given is not None and given.dtype == self.dtype and tuple(given.shape) == self.shape
        return given if same else None

    def source(self) -> Source | None:
        # Random numbers need cursors of their own.
        return self._source if self._source is not None and self._source.pieces.is_moved else None

    def _now(self) -> TensorRef:
        """Return the tensor as its tape numbers it now."""
        with torch._C.DisableTorchFunction():
            meta = torch.empty(0, dtype=torch.uint8, device="meta").set_(self._storage)
        number = self._record.tape.number(meta)
        assert number is not None
        return replace(self._ref, storage=number)

    def _end(self) -> int:
        """Return the index behind the last step that counts."""
        return self._last.index + 1 if self._last is not None else 0

    def _cursors(self, pieces: RangedStorage) -> Cursors:
        cursors: Cursors | None = getattr(self._local, "cursors", None)
        if cursors is None:
            cursors = self._local.cursors = Cursors(pieces.program)
        return cursors

    def _made_whole(self) -> Source:
        # Not by the record's own replayer: nothing is drawn, so no other thread has to wait.
        tape, ref = self._record.tape, self._now()
        steps = backward_slice(tape, [ref.storage], self._end())
        return _in_memory(Replayer(tape, self._record.device).contents(steps, [ref.storage])[ref.storage], ref)


def _in_memory(storage: torch.UntypedStorage, ref: TensorRef) -> Source:
    # What a device has made is read on the host.
    flat = view(storage, ref).resolve_conj().resolve_neg().reshape(-1).cpu()
    write = Copied(0, flat.numel(), True, Constant(flat))
    return Source(Pieces(None, flat.numel(), ref.dtype, [write]), 0)
