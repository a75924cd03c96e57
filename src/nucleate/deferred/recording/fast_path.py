"""The fast path to the tape for the most frequent operations of constructors: making memory and filling it.

It does the same as `Recorder` does for any operation, without the questions whose answers are known. It handles a fill
of one dense deferred tensor by plain numbers that the same fill has taken before, and a factory of plain sizes.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from nucleate.deferred.active import alone
from nucleate.deferred.recording.op_schema import OpSchema
from nucleate.deferred.recording.real_memory import RealMemory
from nucleate.deferred.replay.replayer import Replayer
from nucleate.deferred.tape.steps import TensorRef
from nucleate.devices import default_generator
from nucleate.devices.generators import Generator

aten = torch.ops.aten

_FILLS = {
    aten.zero_.default, aten.fill_.Scalar, aten.normal_.default, aten.uniform_.default,
}  # fmt: skip
_FACTORIES = {aten.empty.memory_format, aten.zeros.default, aten.ones.default}
_NUMBERS = (int, float)

# Fills that took these numbers for a dtype; torch may refuse others. Process-wide: torch's answer does not change.
_taken: set[tuple[Any, torch.dtype, tuple[float, ...]]] = set()


class FastPath:
    """The recorder of frequent operations that need no questions.

    Args:
        replayer: The replayer, which has the tape, the random program and the device that deferred tensors stand for.
        exposed: The deferred tensors whose memory is real.
        handed_out: The list that gets the deferred tensors that Python is going to hold. (A method of the recorder
            would make a reference cycle, and a recorder must be freed with its last tensor.)
    """

    def __init__(self, replayer: Replayer, exposed: RealMemory, handed_out: list[weakref.ref[Tensor]]) -> None:
        self._replayer = replayer
        self._exposed = exposed
        self._handed_out = handed_out

    def remember_fill(self, func: Any, args: tuple[Any, ...]) -> None:
        """Remember that a fill takes these numbers. A fill of zero elements does not count, because it takes any."""
        plain = func in _FILLS and all(type(number) in _NUMBERS for number in args[1:])
        if plain and args[0].numel() and args[0].is_floating_point():
            _taken.add((func, args[0].dtype, args[1:]))

    def record_fill(self, func: Any, schema: OpSchema, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Record a fill, if it is one of those that need no questions.

        Returns:
            Whether it was recorded; if not, nothing has happened.
        """
        if func not in _FILLS or (kwargs and kwargs.keys() != {"generator"}):
            return False
        tensor: Tensor = args[0]
        # Numbers of other types may have another hash for equal values, or no hash.
        if not all(type(number) in _NUMBERS for number in args[1:]) or (func, tensor.dtype, args[1:]) not in _taken:
            return False
        tape = self._replayer.tape
        number = tape.number(tensor)
        plain = tensor.is_contiguous() and not tensor.is_complex() and not tensor.is_neg()
        if number is None or not plain or self._exposed.holds(tensor):
            return False
        offset = int(tensor.storage_offset())
        ref = TensorRef(number, tensor.dtype, tuple(tensor.size()), tensor.stride(), offset, False, False)
        if not schema.is_random:
            tape.overwrite(ref, func, (ref, *args[1:]), dict(kwargs), outputs=(ref,))
            return True
        random = self._replayer.random
        generator = generator_for(self._replayer.device, kwargs.get("generator"))
        position = random.locate(generator)
        step = tape.overwrite(ref, func, (ref, *args[1:]), dict(kwargs), outputs=(ref,), position=position)
        random.follow(generator, position, step)
        return True

    def record_factory(
        self, func: Any, schema: OpSchema, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Record a factory that makes a dense tensor for the recorder's device.

        Returns:
            The tensor, or None if the factory needs questions; then nothing has happened.
        """
        if func not in _FACTORIES or len(args) != 1 or kwargs.get("layout") not in (None, torch.strided):
            return None
        if kwargs.get("pin_memory") or "memory_format" in kwargs:
            return None
        device = self._replayer.device
        with alone(device):
            tensor: Tensor = func(*args, **{**kwargs, "device": torch.device("meta")})
        tape = self._replayer.tape
        number = tape.add_storage(tensor)
        self._handed_out.append(weakref.ref(tensor))
        ref = TensorRef(number, tensor.dtype, tuple(tensor.size()), tensor.stride(), 0, False, False)
        kept = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        step = tape.step(
            func,
            (list(args[0]),),
            {**kept, "device": device},
            outputs=(ref,),
            creates=(number,),
            uninitialized=schema.uninitialized,
        )
        tape.append(step)
        return tensor


def generator_for(device: torch.device, explicit: torch.Generator | None) -> Generator:
    """Return the generator that a step draws from: the explicit one, or the default one of a device.

    Raises:
        RuntimeError: The explicit generator is for another kind of device. torch refuses it as well.
    """
    if explicit is None:
        return default_generator(device)
    if explicit.device.type != device.type:
        raise RuntimeError(f"Expected a '{device.type}' device type for generator but found '{explicit.device.type}'")
    return explicit
