"""Handles: each connects a deferred tensor to its recording after the constructor has ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nucleate.deferred.active import Recording, is_recording
from nucleate.errors import DeferredEditError

_NAME = "_nucleate_deferred"


@dataclass(frozen=True, slots=True)
class Handle:
    """The connection of a deferred tensor to its recording.

    Attributes:
        record: The recording that can make the tensor's value.
        fqn: The tensor's FQN, as far as it is known.
        cls: The tensor's class before it was guarded.
        version: The tensor's version counter when it was guarded. A higher number shows an edit through an alias.
        num_writes: The number of steps that had written its storage by then.
    """

    record: Recording
    fqn: str
    cls: type[Tensor]
    version: int
    num_writes: int


def handle_of(tensor: Any) -> Handle | None:
    """Return the handle of a guarded deferred tensor, or None for any other object."""
    return tensor.__dict__.get(_NAME) if isinstance(tensor, Tensor) else None


def attach(tensor: Tensor, record: Recording, fqn: str, cls: type[Tensor]) -> None:
    """Give a deferred tensor a new handle, which holds its present version and writes."""
    with torch._C.DisableTorchFunction():
        tensor.untyped_storage().__class__ = GuardedStorage
        number = record.tape.number(tensor)
        assert number is not None, "not a deferred tensor of this record"
        tensor.__dict__[_NAME] = Handle(record, fqn, cls, _version(tensor), len(record.tape.writers(number)))


def release(tensor: Tensor) -> None:
    """Take the guard off: restore the tensor's class, and remove its handle."""
    handle = tensor.__dict__.pop(_NAME, None)
    if handle is not None:
        tensor.__class__ = handle.cls
        with torch._C.DisableTorchFunction():
            tensor.untyped_storage().__class__ = torch.UntypedStorage


@contextmanager
def lifted(guarded: Sequence[Tensor]) -> Iterator[None]:
    """Take the guards off inside the context, and put them back on exit."""
    held = [(tensor, type(tensor), tensor.__dict__.pop(_NAME)) for tensor in {id(t): t for t in guarded}.values()]
    for tensor, _, handle in held:
        tensor.__class__ = handle.cls
    try:
        yield
    finally:
        for tensor, cls, handle in held:
            tensor.__dict__[_NAME] = handle
            tensor.__class__ = cls


def is_edited(tensor: Tensor, handle: Handle) -> bool:
    """Return whether a deferred tensor was written through an alias while no recorder saw it."""
    with torch._C.DisableTorchFunction():
        return _is_edited(tensor, handle, handle.record.tape.number(tensor))


def _is_edited(tensor: Tensor, handle: Handle, number: int | None) -> bool:
    if number is None:
        return True
    # A recorded write, in a context that was entered again, also raises the counter of every alias.
    num_recorded = len(handle.record.tape.writers(number)) - handle.num_writes
    return _version(tensor) - handle.version > max(num_recorded, 0)


def is_shared(tensor: Tensor, handle: Handle) -> bool:
    """Return whether a real storage has replaced that of a deferred tensor, so that its values may have changed."""
    with torch._C.DisableTorchFunction():
        return _is_shared(handle, handle.record.tape.number(tensor))


def _is_shared(handle: Handle, number: int | None) -> bool:
    return number is not None and handle.record.tape.made(number) is not None


def staleness(tensor: Tensor, handle: Handle) -> Literal["edited", "shared"] | None:
    """Return whether `is_edited` or `is_shared` holds. This looks for the tensor's storage only once."""
    with torch._C.DisableTorchFunction():
        number = handle.record.tape.number(tensor)
        if _is_edited(tensor, handle, number):
            return "edited"
        return "shared" if _is_shared(handle, number) else None


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class GuardedStorage(torch.UntypedStorage):
    """The storage of a deferred tensor after its constructor. It refuses writes, which torch misses on meta."""

    def fill_(self, *args: Any) -> Any:
        _refuse_storage("fill_")
        return super().fill_(*args)  # type: ignore[misc]

    def copy_(self, *args: Any, **kwargs: Any) -> Any:
        _refuse_storage("copy_")
        return super().copy_(*args, **kwargs)

    def resize_(self, *args: Any) -> Any:
        _refuse_storage("resize_")
        return super().resize_(*args)

    def __setitem__(self, *args: Any) -> None:
        _refuse_storage("assigning its elements")
        super().__setitem__(*args)  # type: ignore[no-untyped-call]


def _refuse_storage(what: str) -> None:
    if not is_recording():
        raise DeferredEditError(
            f"this is the storage of a deferred tensor, and {what} would edit it outside the context that records it, "
            "so the edit would be lost. Do it in an `init_module(empty_init=True)` block (you can enter one again), "
            "or after `setup`."
        )
