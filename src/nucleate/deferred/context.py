"""The contexts that turn a constructor into recipes, and what is done to the recipes afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from nucleate.deferred.active import active_record, active_records, awaited_onsets, real_tensors
from nucleate.deferred.elements.conversion import Conversion, converted
from nucleate.deferred.elements.source import Given
from nucleate.deferred.guards.handle import handle_of, is_shared
from nucleate.deferred.guards.refusals import refuse_stale
from nucleate.deferred.module_tensors import held_tensors
from nucleate.deferred.onset import Onset
from nucleate.deferred.record import Record, record_of
from nucleate.devices import concrete


@contextmanager
def deferred(device: torch.device | str = "cpu") -> Iterator[Record]:
    """Construct models without making their tensors: each becomes a recipe, made later by `materialize`.

    Args:
        device: The device that the tensors will live on; construction behaves as it would there. For a device other
            than the CPU the reference is construction under `torch.device(device)`, which the caller enters. A device
            that this machine does not have can be recorded for, but nothing can be made.

    Yields:
        The record. On exit, also by an exception, every random generator stands where eager construction would
        have left it.

    Example:
        >>> import torch
        >>> from nucleate.deferred import deferred
        >>> from nucleate.materialize import materialize
        >>> with deferred():
        ...     model = torch.nn.Linear(2, 2)
        >>> print(repr(model.weight).splitlines()[-1])
        Parameter(deferred, shape=(2, 2), dtype=torch.float32)
        >>> _ = materialize(model)
    """
    device = concrete(device)
    outer = active_record(device)
    if isinstance(outer, Record) and outer.thread == threading.get_ident():
        # Inside another recording for the same device there is nothing to begin and nothing to end.
        with outer.factories(real=False), outer.staying():
            yield outer
        return
    record = Record(device)
    with record.recording():
        yield record


@contextmanager
def deferred_from(numel: int, device: torch.device) -> Iterator[Record]:
    """Construct models, and record from the first tensor on that has so many elements; what precedes is real.

    Args:
        numel: How many elements such a tensor has.
        device: See `deferred`.

    Yields:
        The record. Its `survivors`, asked for as the last thing inside, are to be made when the context has ended.
    """
    record = Record(device)
    with record.recording(Onset(numel)):
        yield record


def give(tensor: Tensor, given: Given) -> None:
    """Let a deferred tensor's content come from elsewhere, such as a file, instead of from its recipe.

    Nothing is read before the tensor is made, and then only the part that is wanted.

    Args:
        tensor: A deferred tensor of the shape of what is given.
        given: The elements.

    Raises:
        DeferredEditError: The tensor was edited where nothing recorded it.
    """
    record = record_of(tensor)
    assert record is not None, "not a deferred tensor"
    handle = handle_of(tensor)
    if handle is not None:
        refuse_stale(tensor, handle)
    record.give(tensor, given)


def convert(tensor: Tensor, conversion: Conversion) -> tuple[Tensor, ...]:
    """Make several tensors of one: codes and scales of a weight, for example.

    Of a deferred tensor this records one step, and what it returns is deferred as well. When that is made, ranges of
    the tensor are made, converted and forgotten, so that it is never whole in memory. A real tensor is converted now.

    Args:
        tensor: The tensor, deferred or real. It is not changed.
        conversion: What to make of it.

    Returns:
        The outputs that the conversion's layout lists.

    Raises:
        ConversionError: The tensor cannot be converted. What only its values can tell is found when they are made.
        DeferredEditError: The tensor was edited where nothing recorded it.
    """
    record = record_of(tensor)
    if record is None:
        return converted(tensor, conversion)
    outer = active_record(record.device)
    if isinstance(outer, Record) and outer.holds(tensor):
        # It guards the outputs when it ends.
        return outer.convert(tensor, conversion)
    handle = handle_of(tensor)
    if handle is not None:
        refuse_stale(tensor, handle)
    return record.convert(tensor, conversion)


@contextmanager
def eager() -> Iterator[None]:
    """Make real tensors inside a `deferred` context, at once; what is done to deferred ones is still recorded.

    The random stream goes on where the recording stands, so that values and stream are those of eager construction.
    Outside a `deferred` context it does nothing.
    """
    with ExitStack() as stack:
        for record in active_records():
            record.settle()
            stack.enter_context(record.factories(real=True))
        for onset in awaited_onsets():
            stack.enter_context(onset.suspended())
        stack.enter_context(real_tensors())
        yield


@contextmanager
def resumed(model: nn.Module) -> Iterator[None]:
    """Record again what is done to the deferred tensors of a model; a model without any is left alone.

    A tensor keeps its guard until something is done to it.

    Args:
        model: The model.
    """
    barren = set[int]()
    held = (tensor for module in model.modules() for _, _, tensor in held_tensors(module, barren))
    records: dict[torch.device, list[Record]] = {}
    for tensor in held:
        handle = handle_of(tensor)
        if handle is not None and not is_shared(tensor, handle):
            assert isinstance(handle.record, Record)
            records.setdefault(handle.record.device, []).append(handle.record)
    with ExitStack() as stack:
        for device, of_device in records.items():
            outer = active_record(device)
            record = outer if isinstance(outer, Record) else of_device[0]
            for other in of_device:
                record.join(other)
            if outer is None:
                stack.enter_context(record.resumed(model))
        yield
