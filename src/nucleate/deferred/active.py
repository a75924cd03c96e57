"""Which recordings are active in this thread, how others see a recording, and whose turn it is among threads."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from nucleate.deferred.elements.source import Given
from nucleate.deferred.onset import Onset
from nucleate.deferred.tape.tape import Tape

#: Threads take turns at operations that are recorded or replayed: they find a generator's place in the stream by its
#: state, and borrow the default generators while they make a value.
turn = threading.RLock()
_NOTHING = nullcontext()


class Recording(ABC):
    """A construction that is recorded, for those who notice what is done to its tensors. `Record` is the only one.

    Attributes:
        device: The device that its deferred tensors stand for.
        answers: Answers to questions about its tensors, by the function of torch that asks.
    """

    device: torch.device
    answers: dict[Any, Any]

    # -- its state -----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def tape(self) -> Tape:
        """What was done to its tensors."""

    @property
    @abstractmethod
    def is_on(self) -> bool:
        """Whether it records this thread."""

    @property
    @abstractmethod
    def onset(self) -> Onset | None:
        """When it begins, if it has not begun yet."""

    @abstractmethod
    def refuse_other_thread(self) -> None:
        """Raise if another thread is recording what this thread wants to change."""

    # -- what others notice --------------------------------------------------------------------------------

    @abstractmethod
    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is one of this recording; a guarded one of its device becomes one."""

    @abstractmethod
    def adopt_guarded(self, tensor: Tensor) -> None:
        """Take the guard off a tensor until this recording ends: what is done to it becomes part of its recipe."""

    @abstractmethod
    def notice(self, module: nn.Module) -> None:
        """Remember a module that was given something while this records."""

    @abstractmethod
    def notice_parameter(self, parameter: Tensor) -> None:
        """Remember a parameter that was made while this records."""

    @abstractmethod
    def notice_state(self, state: Tensor) -> None:
        """Remember a generator's state that was handed out while this records."""

    # -- values --------------------------------------------------------------------------------------------

    @abstractmethod
    def value(self, tensor: Tensor) -> Tensor:
        """Return a real tensor with the value that a deferred tensor has now. It must not be written to."""

    @abstractmethod
    def expose(self, tensor: Tensor) -> Tensor:
        """Return a real tensor that shares memory with a deferred one, from here on until the end."""

    @abstractmethod
    def is_exposed(self, tensor: Tensor) -> bool:
        """Return whether a deferred tensor lies on real memory."""

    @abstractmethod
    def settle(self) -> None:
        """Put every generator where eager construction would have left it."""

    # -- what is recorded ----------------------------------------------------------------------------------

    @abstractmethod
    def opaque(
        self, func: Callable[..., Tensor], tensor: Tensor, args: tuple[Any, ...], generator: torch.Generator | None
    ) -> Tensor:
        """Record a Python function that fills a tensor with numbers it cannot say beforehand how to draw."""

    @abstractmethod
    def given_by(self, target: Tensor, value: Any) -> Given | None:
        """Return what a real tensor gives to a deferred one by reference, if it is not to be cloned."""

    @abstractmethod
    def give(self, tensor: Tensor, given: Given) -> None:
        """Record that a deferred tensor's content is what is given, whatever it was before."""

    @abstractmethod
    def of_lazy(self, value: Any) -> Tensor | None:
        """Return a deferred tensor for one that its library has not read yet, or None for any other value."""

    # -- contexts ------------------------------------------------------------------------------------------

    @abstractmethod
    def followed(self) -> Callable[[], AbstractContextManager[object]] | None:
        """Return a context in which another thread is recorded as this one is now; None where this one is not."""

    @abstractmethod
    def reopened(self) -> AbstractContextManager[object]:
        """Record one call on tensors that keep their guards otherwise; what it makes anew is real."""

    @abstractmethod
    def impersonating(self) -> AbstractContextManager[object]:
        """Let its deferred tensors look like tensors of its device."""

    @abstractmethod
    def factories(self, real: bool) -> AbstractContextManager[object]:
        """Let factories make real tensors, or deferred ones again, while operations on deferred ones are recorded."""

    @abstractmethod
    def loading(self) -> AbstractContextManager[object]:
        """Take by reference what is copied from real tensors into deferred ones."""


class _Active(threading.local):
    def __init__(self) -> None:
        self.records: list[Recording] = []
        self.num_eager = 0


_active = _Active()


def active_records() -> list[Recording]:
    """Return the recordings that record in this thread, outermost first."""
    # A thread may outlive the context that it was started in.
    return [record for record in _active.records if record.is_on]


def awaited_onsets() -> list[Onset]:
    """Return the onsets of those recordings in this thread that have not begun yet."""
    return [record.onset for record in _active.records if record.onset is not None]


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
def active(record: Recording) -> Iterator[None]:
    """Have a recording among those that record in this thread."""
    _active.records.append(record)
    try:
        yield
    finally:
        _active.records.remove(record)


def active_record(device: torch.device) -> Recording | None:
    """Return the innermost recording that records for a device in this thread."""
    return next((record for record in reversed(active_records()) if record.device == device), None)


def active_record_of(value: Any) -> Recording | None:
    """Return the recording of this thread that a tensor is deferred in, or None for any other value."""
    if not isinstance(value, Tensor):
        return None
    return next((record for record in active_records() if record.tape.number(value) is not None), None)


def alone(device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a recording finds out what an operation makes, unseen by those for other devices.

    They would take what it makes on the meta device for tensors of their own.

    Args:
        device: The recording's device.
    """
    records = _active.records
    is_alone = len(records) < 2 or all(record.device == device for record in records)
    return _NOTHING if is_alone else _disable_current_modes()


def is_recording() -> bool:
    """Return whether this thread is inside a `deferred` context."""
    return bool(active_records())
