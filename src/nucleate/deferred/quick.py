"""The short way to the tape for what constructors do most: make memory, and fill it with numbers.

Everything here does what `Recorder` does for any operation, with the questions left out whose answers are known: a
fill of one dense deferred tensor by plain numbers that the same fill has taken before, and a factory of plain sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nucleate.deferred.active import alone
from nucleate.deferred.tape import Step, TensorRef
from nucleate.deferred.traits import Traits

if TYPE_CHECKING:
    from nucleate.deferred.record import Recorder

aten = torch.ops.aten

_FILLS = {
    aten.zero_.default, aten.fill_.Scalar, aten.normal_.default, aten.uniform_.default,
}  # fmt: skip
_FACTORIES = {aten.empty.memory_format, aten.zeros.default, aten.ones.default}
_NUMBERS = (int, float)

# Fills that took these numbers for a dtype; others may be refused.
_taken: set[tuple[Any, torch.dtype, tuple[float, ...]]] = set()


def remember_fill(func: Any, args: tuple[Any, ...]) -> None:
    """Remember that a fill takes these numbers. On no elements it takes any."""
    plain = func in _FILLS and all(type(number) in _NUMBERS for number in args[1:])
    if plain and args[0].numel() and args[0].is_floating_point():
        _taken.add((func, args[0].dtype, args[1:]))


def record_fill(recorder: Recorder, func: Any, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Record a fill, if it is one of those that need no questions.

    Returns:
        Whether it was recorded; if not, nothing has happened.
    """
    if func not in _FILLS or (kwargs and kwargs.keys() != {"generator"}):
        return False
    tensor: Tensor = args[0]
    # Numbers of other types have other hashes for equal values, or none.
    if not all(type(number) in _NUMBERS for number in args[1:]) or (func, tensor.dtype, args[1:]) not in _taken:
        return False
    tape = recorder.tape
    number = tape.number(tensor)
    plain = tensor.is_contiguous() and not tensor.is_complex() and not tensor.is_neg()
    if number is None or not plain or recorder.exposed.holds(tensor):
        return False
    offset = int(tensor.storage_offset())
    ref = TensorRef(number, tensor.dtype, tuple(tensor.size()), tensor.stride(), offset, False, False)
    is_full = offset == 0 and ref.numel * ref.dtype.itemsize == tape.size_bytes(number)
    generator = None
    if traits.is_random:
        generator = recorder.generator(kwargs.get("generator"))
    random = recorder.replayer.random
    step = Step(
        index=len(tape.steps),
        func=func,
        args=(ref, *args[1:]),
        kwargs=dict(kwargs),
        outputs=(ref,),
        reads=() if is_full else (number,),
        written=(ref,),
        creates=(),
        overwrites=(number,) if is_full else (),
        default_dtype=torch.get_default_dtype(),
        position=None if generator is None else random.locate(generator),
    )
    tape.add_step(step)
    if generator is not None:
        assert step.position is not None
        random.follow(generator, step.position, step)
    return True


def record_factory(
    recorder: Recorder, func: Any, traits: Traits, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Record a factory that makes a dense tensor for the recorder's device.

    Returns:
        The tensor, or None if it is not one of those that need no questions; then nothing has happened.
    """
    if func not in _FACTORIES or len(args) != 1 or kwargs.get("layout") not in (None, torch.strided):
        return None
    if kwargs.get("pin_memory") or "memory_format" in kwargs:
        return None
    with alone(recorder.device):
        tensor: Tensor = func(*args, **{**kwargs, "device": torch.device("meta")})
    tape = recorder.tape
    number = tape.add_storage(tensor)
    recorder.hand_out(tensor)
    ref = TensorRef(number, tensor.dtype, tuple(tensor.size()), tensor.stride(), 0, False, False)
    kept = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    tape.add_step(
        Step(
            index=len(tape.steps),
            func=func,
            args=(list(args[0]),),
            kwargs={**kept, "device": recorder.device},
            outputs=(ref,),
            reads=(),
            written=(),
            creates=(number,),
            overwrites=(),
            default_dtype=torch.get_default_dtype(),
            uninitialized=traits.uninitialized,
        )
    )
    return tensor
