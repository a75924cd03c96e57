"""Which records are recording in this thread, and whose turn it is among threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from nucleate.deferred.context import Record
    from nucleate.deferred.onset import Onset

#: Threads take turns at operations that are recorded or replayed: they find a generator's place in the stream by its
#: state, and borrow the default generators while they make a value.
turn = threading.RLock()
_NOTHING = nullcontext()


class _Active(threading.local):
    def __init__(self) -> None:
        self.records: list[Record] = []
        self.num_eager = 0


_active = _Active()


def active_records() -> list[Record]:
    """Return the records that record in this thread, outermost first."""
    # A thread may outlive the context that it was started in.
    return [record for record in _active.records if record.recorder.is_on]


def awaited_onsets() -> list[Onset]:
    """Return the onsets of those records in this thread that have not begun yet."""
    return [record.recorder.onset for record in _active.records if record.recorder.onset is not None]


@contextmanager
def real_tensors() -> Iterator[None]:
    """Note that somebody wants real tensors from this thread."""
    _active.num_eager += 1
    try:
        yield
    finally:
        _active.num_eager -= 1


def wants_real() -> bool:
    """Return whether this thread is inside an `eager` context."""
    return _active.num_eager > 0


@contextmanager
def active(record: Record) -> Iterator[None]:
    """Have a record among those that record in this thread."""
    _active.records.append(record)
    try:
        yield
    finally:
        _active.records.remove(record)


def active_record(device: torch.device) -> Record | None:
    """Return the innermost record that records for a device in this thread."""
    return next((record for record in reversed(active_records()) if record.device == device), None)


def alone(device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a record finds out what an operation makes, unseen by those for other devices.

    They would take what it makes on the meta device for tensors of their own.

    Args:
        device: The record's device.
    """
    records = _active.records
    is_alone = len(records) < 2 or all(record.device == device for record in records)
    return _NOTHING if is_alone else _disable_current_modes()


def is_recording() -> bool:
    """Return whether this thread is inside a `deferred` context."""
    return bool(active_records())
