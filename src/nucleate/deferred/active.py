"""Active recordings: the recordings of each thread, the interface of a recording, and the lock between threads."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from nucleate.deferred.elements.element_source import ElementSource
from nucleate.deferred.onset import Onset
from nucleate.deferred.tape.tape import Tape

#: Threads take turns at operations that are recorded or replayed. Such an operation finds a generator's position by the
#: generator's state, and borrows the default generators while it makes a value.
turn = threading.RLock()
_NOTHING = nullcontext()


class Recording(ABC):
    """A recording, as seen by the code that notices operations on its tensors. `Record` is the only subclass.

    Attributes:
        device: The device that its deferred tensors stand for.
        answers: Answers to questions about its tensors. The keys are the functions of torch that ask.
    """

    device: torch.device
    answers: dict[Any, Any]

    # -- its state -----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def tape(self) -> Tape:
        """The tape with the operations on its tensors."""

    @property
    @abstractmethod
    def is_on(self) -> bool:
        """Whether this recording records the current thread."""

    @property
    @abstractmethod
    def onset(self) -> Onset | None:
        """The onset of a recording that has not begun yet, else None."""

    @abstractmethod
    def refuse_other_thread(self) -> None:
        """Raise an error if another thread is recording the tensors that this thread wants to change."""

    # -- notices from other code ---------------------------------------------------------------------------

    @abstractmethod
    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor belongs to this recording. A guarded tensor of its device joins the recording."""

    @abstractmethod
    def adopt_guarded(self, tensor: Tensor) -> None:
        """Remove the guard of a tensor until this recording ends. Operations on the tensor then extend its recipe."""

    @abstractmethod
    def notice(self, module: nn.Module) -> None:
        """Remember a module that got a parameter, a buffer, a submodule or a state while this recording was on."""

    @abstractmethod
    def notice_parameter(self, parameter: Tensor) -> None:
        """Remember a parameter that was made while this recording was on."""

    @abstractmethod
    def notice_state(self, state: Tensor) -> None:
        """Remember a generator's state that a caller got while this recording was on."""

    # -- values --------------------------------------------------------------------------------------------

    @abstractmethod
    def value(self, tensor: Tensor) -> Tensor:
        """Return a real tensor with the present value of a deferred tensor. The caller must not write to it."""

    @abstractmethod
    def expose(self, tensor: Tensor) -> Tensor:
        """Return a real tensor that shares memory with a deferred one from now on."""

    @abstractmethod
    def is_exposed(self, tensor: Tensor) -> bool:
        """Return whether a deferred tensor lies on real memory."""

    @abstractmethod
    def settle(self) -> None:
        """Put every generator into the state in which eager construction would have left it."""

    # -- recorded operations -------------------------------------------------------------------------------

    @abstractmethod
    def opaque(
        self, func: Callable[..., Tensor], tensor: Tensor, args: tuple[Any, ...], generator: torch.Generator | None
    ) -> Tensor:
        """Record a Python function that fills a tensor, and whose number of draws is not known beforehand."""

    @abstractmethod
    def given_by(self, target: Tensor, value: Any) -> ElementSource | None:
        """Return an element source for a real tensor that a deferred one refers to, or None for other values."""

    @abstractmethod
    def bind(self, tensor: Tensor, given: ElementSource) -> None:
        """Record that a deferred tensor takes its whole value from an element source."""

    @abstractmethod
    def of_lazy(self, value: Any) -> Tensor | None:
        """Return a deferred tensor for a tensor that its library has not read yet, or None for any other value."""

    # -- contexts ------------------------------------------------------------------------------------------

    @abstractmethod
    def followed(self) -> Callable[[], AbstractContextManager[object]] | None:
        """Return a context that records another thread as this one is recorded now, or None if this one is not."""

    @abstractmethod
    def reopened(self) -> AbstractContextManager[object]:
        """Record one call on guarded tensors, which keep their guards afterwards. New tensors of the call are real."""

    @abstractmethod
    def impersonating(self) -> AbstractContextManager[object]:
        """Make its deferred tensors look like tensors of its device."""

    @abstractmethod
    def factories(self, real: bool) -> AbstractContextManager[object]:
        """Make factories return real tensors, or deferred ones again. Operations on deferred tensors stay recorded."""

    @abstractmethod
    def loading(self) -> AbstractContextManager[object]:
        """Refer to real tensors that are copied into deferred ones, instead of cloning them."""


class _Active(threading.local):
    def __init__(self) -> None:
        self.records: list[Recording] = []
        self.num_eager = 0


_active = _Active()


def active_records() -> list[Recording]:
    """Return the recordings that are on in this thread, outermost first."""
    # A thread may outlive the context that it was started in.
    return [record for record in _active.records if record.is_on]


def awaited_onsets() -> list[Onset]:
    """Return the onsets of the recordings in this thread that have not begun yet."""
    return [record.onset for record in _active.records if record.onset is not None]


@contextmanager
def real_tensors() -> Iterator[None]:
    """Note that this thread is inside an `eager` context."""
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
    """Add a recording to the recordings of this thread."""
    _active.records.append(record)
    try:
        yield
    finally:
        _active.records.remove(record)


def active_record(device: torch.device) -> Recording | None:
    """Return the innermost recording for a device that is on in this thread."""
    return next((record for record in reversed(active_records()) if record.device == device), None)


def active_record_of(value: Any) -> Recording | None:
    """Return the recording of this thread that a deferred tensor belongs to, or None for any other value."""
    if not isinstance(value, Tensor):
        return None
    return next((record for record in active_records() if record.tape.number(value) is not None), None)


def alone(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a recording runs an operation on the meta device, unseen by those for other devices.

    Those would take the operation's meta tensors for tensors of their own.

    Args:
        device: The recording's device.
    """
    records = _active.records
    is_alone = len(records) < 2 or all(record.device == device for record in records)
    return _NOTHING if is_alone else _disable_current_modes()


def is_recording() -> bool:
    """Return whether this thread is inside a `deferred` context."""
    return bool(active_records())
