"""What one call of an operation reads and writes: tensors by its traits, storages by where these lie."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from nucleate.deferred.tape import Tape, TensorRef, tensors
from nucleate.deferred.traits import Traits


def written_by(traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that a call writes."""
    found: list[Tensor] = []
    for position, name, _ in traits.mutated:
        value = args[position] if position < len(args) else kwargs.get(name)
        found.extend(tensors(value))
    return found


def read_by(traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors whose content matters to a call: all arguments but those that are only written."""
    if not traits.mutated:
        yield from tensors((args, kwargs))
        return
    blind = {position for position, name, is_out in traits.mutated if is_out or (traits.fills and name == "self")}
    yield from tensors([arg for index, arg in enumerate(args) if index not in blind])
    outs = {name for _, name, is_out in traits.mutated if is_out}
    yield from tensors([arg for name, arg in kwargs.items() if name not in outs])


def needed_by(tape: Tape, read: Iterable[Tensor], written: Iterable[TensorRef]) -> tuple[int, ...]:
    """Return the storages that must be there before a call.

    Args:
        tape: The tape.
        read: The tensors whose content matters.
        written: The deferred ones that it writes.
    """
    numbers = (tape.number(tensor) for tensor in read)
    needed = dict.fromkeys(number for number in numbers if number is not None)
    for ref in written:
        # A write to a part keeps the rest.
        if not ref.fills(tape.size_bytes(ref.storage)):
            needed[ref.storage] = None
    return tuple(needed)


def overwritten_by(
    tape: Tape, traits: Traits, written: tuple[TensorRef, ...], reads: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the storages whose old content a call replaces entirely without looking at it."""
    if not (traits.fills or any(is_out for _, _, is_out in traits.mutated)):
        return ()
    return tuple(ref.storage for ref in written if ref.storage not in reads and ref.fills(tape.size_bytes(ref.storage)))
