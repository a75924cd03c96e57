"""Contexts that record the recipes of a constructor, and functions that extend the recipes afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn

from nucleate.deferred.active import Recording, active_record, active_records, awaited_onsets, real_tensors
from nucleate.deferred.elements.conversion import Conversion, converted
from nucleate.deferred.elements.element_source import ElementSource
from nucleate.deferred.guards.handle import handle_of, is_shared
from nucleate.deferred.guards.refusals import refuse_stale
from nucleate.deferred.module_tensors import held_tensors
from nucleate.deferred.onset import Onset
from nucleate.deferred.record import Record, record_of
from nucleate.devices import concrete


@contextmanager
def deferred(device: torch.device | str = "cpu") -> Iterator[Record]:
    """Construct models with deferred tensors. `materialize` makes their values later from the recorded recipes.

    Args:
        device: The device that the tensors will live on. Construction behaves as on this device. For a device other
            than the CPU the reference is construction under `torch.device(device)`, which the caller enters. The
            device may be absent from this machine; then construction is recorded, but no tensor can be materialized.

    Yields:
        The record. On exit, also by an exception, every random generator has the state that eager construction
        would have left.

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
        # The other recording for the same device, which is on already, records this block as well.
        with outer.factories(real=False), outer.staying():
            yield outer
        return
    record = Record(device)
    with record.recording():
        yield record


@contextmanager
def deferred_from(numel: int, device: torch.device) -> Iterator[Record]:
    """Construct models, and record from the first large tensor on. The tensors before it are real.

    Args:
        numel: The number of elements from which on a tensor is large.
        device: See `deferred`.

    Yields:
        The record. Call its `survivors` at the end of the context, and materialize them after the context.
    """
    record = Record(device)
    with record.recording(Onset(numel)):
        yield record


def bind(tensor: Tensor, given: ElementSource) -> None:
    """Bind a deferred tensor to an element source, such as a file, instead of to its recipe.

    Nothing is read before the tensor is made. Then only the part that is wanted is read.

    Args:
        tensor: A deferred tensor of the shape of the element source.
        given: The element source.

    Raises:
        DeferredEditError: The tensor was edited where nothing recorded it.
    """
    record = record_of(tensor)
    assert record is not None, "not a deferred tensor"
    handle = handle_of(tensor)
    if handle is not None:
        refuse_stale(tensor, handle)
    record.bind(tensor, given)


def bind_all(bindings: Iterable[tuple[Tensor, ElementSource]]) -> None:
    """Bind many deferred tensors, which the caller has given to `refuse_stale`. See `bind`."""
    for record, some in groupby(bindings, lambda binding: record_of(binding[0])):
        assert record is not None, "not a deferred tensor"
        record.bind_all(some)


def convert(tensor: Tensor, conversion: Conversion) -> tuple[Tensor, ...]:
    """Convert one tensor into several, for example a weight into codes and scales.

    For a deferred tensor this records one step, and the outputs are deferred as well. When the outputs are made,
    ranges of the tensor are made, converted and freed, so that the tensor is never whole in memory. A real tensor is
    converted now.

    Args:
        tensor: The tensor, deferred or real. It is not changed.
        conversion: The conversion.

    Returns:
        The outputs that the conversion's layout lists.

    Raises:
        ConversionError: The tensor cannot be converted. Errors that depend on its values are raised when the
            values are made.
        DeferredEditError: The tensor was edited where nothing recorded it.
    """
    record = record_of(tensor)
    if record is None:
        return converted(tensor, conversion)
    outer = active_record(record.device)
    if isinstance(outer, Record) and outer.holds(tensor):
        # This recording guards the outputs when it ends.
        return outer.convert(tensor, conversion)
    handle = handle_of(tensor)
    if handle is not None:
        refuse_stale(tensor, handle)
    return record.convert(tensor, conversion)


@contextmanager
def eager() -> Iterator[None]:
    """Make real tensors at once inside a `deferred` context. Operations on deferred tensors are still recorded.

    The random stream goes on from the position of the recording, so that values and stream are those of eager
    construction. Outside a `deferred` context this context does nothing.
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
    """Record operations on the deferred tensors of a model again. A model without deferred tensors is left alone.

    A tensor keeps its guard until the first operation on it.

    Args:
        model: The model.
    """
    barren = set[int]()
    held = (tensor for module in model.modules() for _, _, tensor in held_tensors(module, barren))
    # Few records, each once: a dict keeps their order.
    records: dict[torch.device, dict[Record, None]] = {}
    seen = set[Recording]()
    for tensor in held:
        handle = handle_of(tensor)
        if handle is not None and handle.record not in seen and not is_shared(tensor, handle):
            assert isinstance(handle.record, Record)
            seen.add(handle.record)
            records.setdefault(handle.record.device, {})[handle.record] = None
    with ExitStack() as stack:
        for device, of_device in records.items():
            outer = active_record(device)
            record = outer if isinstance(outer, Record) else next(iter(of_device))
            for other in of_device:
                record.join(other)
            if outer is None:
                stack.enter_context(record.resumed(model))
        yield
