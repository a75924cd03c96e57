"""Replay: the value of a storage is made from the steps that still matter to it, and from no other steps.

`backward_slice` finds the steps that the value of a storage depends on. It leaves out writes that a later full
overwrite makes dead, so a parameter that was initialized twice costs one initialization. `Replayer` runs such a slice
on a real device, each random step from its own generator state. It frees every intermediate storage as soon as no later
step of the slice needs it.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nucleate.deferred.randomness.program import RandomProgram
from nucleate.deferred.tape.leaves import map_leaves, tensors
from nucleate.deferred.tape.steps import Constant, Step, TensorRef
from nucleate.deferred.tape.tape import Tape
from nucleate.deferred.torch_modes import plain_modes
from nucleate.devices import default_generator, is_present
from nucleate.devices.generators import Generator
from nucleate.errors import DeferredUseError, ReplayError


def backward_slice(tape: Tape, storages: Sequence[int], end: int | None = None) -> list[Step]:
    """Return the steps that the content of `storages` depends on, in the order in which they were recorded.

    Args:
        tape: The tape.
        storages: Storages whose content is wanted.
        end: Use the tape as it was before the step with this index; by default, use the whole tape.
    """
    included: set[int] = set()
    scanned: set[tuple[int, int]] = set()
    wanted = [(storage, len(tape.steps) if end is None else end) for storage in storages]
    while wanted:
        storage, before = wanted.pop()
        writers = tape.writers(storage)
        for place in range(bisect_left(writers, before) - 1, -1, -1):
            index = writers[place]
            if (storage, index) in scanned:
                break
            scanned.add((storage, index))
            step = tape.steps[index]
            if index not in included:
                included.add(index)
                wanted.extend((read, index) for read in step.reads)
            if storage in step.overwrites or storage in step.creates:
                break
    return [tape.steps[index] for index in sorted(included)]


class Replayer:
    """A replayer, which runs slices of one tape.

    Args:
        tape: The tape.
        device: The device that deferred tensors stand for while recording.
    """

    def __init__(self, tape: Tape, device: torch.device) -> None:
        self.tape = tape
        self.device = device
        # Weakly, so that a recording is freed with its last tensor and not by a later garbage collection.
        replayer = weakref.proxy(self)
        self.random = RandomProgram(lambda state, step: replayer.behind(state, step))
        # The generators that `plain_torch` restores when it ends, with their states; None outside.
        self._borrowed: dict[int, tuple[Generator, Tensor]] | None = None

    def storage(
        self, number: int, device: torch.device, scratch: torch.UntypedStorage | None = None
    ) -> torch.UntypedStorage:
        """Make the content of a storage of the tape, and leave the generators as they were.

        Args:
            number: The storage's number.
            device: The device to make it on.
            scratch: Memory on `device`, large enough, that may be used instead of new memory.
        """
        with self.plain_torch():
            return self._run(backward_slice(self.tape, [number]), [number], device, scratch)[number]

    def contents(
        self, steps: list[Step], storages: Sequence[int], device: torch.device | None = None
    ) -> dict[int, torch.UntypedStorage]:
        """Return the contents that a slice gives to several storages, on `device` or on the one that they stand for.

        If that one is absent, values that depend on no random number are made on the CPU, for somebody to look at.
        """
        with self.plain_torch():
            return self._run(steps, storages, device or self._looked_at_on(steps))

    def execute_unrecorded(self, step: Step) -> tuple[tuple[Any, ...], dict[str, Any], Any, Tensor | None]:
        """Run a step that is not on the tape yet, on real values.

        Returns:
            The step's real positional arguments, keyword arguments and result, and the generator's state behind the
            step. The state is None if the step is not random or the device is absent.
        """
        with self.plain_torch():
            needed = sorted({*step.reads, *step.writes})
            before = backward_slice(self.tape, needed)
            where = self._looked_at_on(before)
            env = self._run(before, needed, where)
            args, kwargs = self._bind(step, env, where)
            generator = None
            if where != self.device:
                # Of random numbers only the geometry is right, and the CPU's generator is restored.
                with torch.random.fork_rng(devices=()):
                    return args, kwargs, step.func(*args, **kwargs), None
            if step.position is not None:
                generator = self._generator(step, self.device)
                generator.set_state(self.random.state_at(step.position))
            result = step.func(*args, **kwargs)
            return args, kwargs, result, None if generator is None else generator.get_state()

    def behind(self, state: Tensor, step: Step) -> Tensor:
        """Execute a random step from the generator's state before it, and return the state behind it."""
        with self.plain_torch():
            needed = sorted({*step.reads, *step.writes} - set(step.overwrites))
            env = self._run(backward_slice(self.tape, needed, step.index), needed, self.device)
            for storage in step.overwrites:
                env[storage] = torch.UntypedStorage(self.tape.size_bytes(storage), device=self.device)
            generator = self._generator(step, self.device)
            generator.set_state(state)
            args, kwargs = self._bind(step, env, self.device)
            step.func(*args, **kwargs)
            return generator.get_state()

    def _run(
        self,
        steps: list[Step],
        wanted: Sequence[int],
        device: torch.device,
        scratch: torch.UntypedStorage | None = None,
    ) -> dict[int, torch.UntypedStorage]:
        if not self._is_looked_at(steps, device):
            self._refuse_device(device)
        last_use = {storage: step.index for step in steps for storage in (*step.reads, *step.writes, *step.creates)}
        kept = set(wanted)
        env: dict[int, torch.UntypedStorage] = {}
        for step in steps:
            for storage in step.overwrites:
                if storage not in env and storage in kept and scratch is not None:
                    env[storage] = scratch
                elif storage not in env:
                    env[storage] = torch.UntypedStorage(self.tape.size_bytes(storage), device=device)
            self._execute(step, env, device)
            for storage in (*step.reads, *step.writes, *step.creates):
                if last_use[storage] == step.index and storage not in kept:
                    env.pop(storage, None)
        for storage in wanted:
            # A storage of zero bytes needs no step.
            if storage not in env and self.tape.size_bytes(storage) == 0:
                env[storage] = torch.UntypedStorage(0, device=device)
        return env

    def _looked_at_on(self, steps: list[Step]) -> torch.device:
        """Return the device on which a constructor's questions about values are answered."""
        host = torch.device("cpu")
        return host if self._is_looked_at(steps, host) else self.device

    def _is_looked_at(self, steps: list[Step], device: torch.device) -> bool:
        is_absent = device.type == "cpu" != self.device.type and not is_present(self.device)
        return is_absent and all(step.position is None for step in steps)

    def _refuse_device(self, device: torch.device) -> None:
        """Raise an error if the recipes cannot be made on a device.

        Raises:
            DeferredUseError: The device is of another kind, or this process does not have it.
        """
        if device.type != self.device.type:
            raise DeferredUseError(
                f"this recipe was recorded for {self.device.type!r} and cannot be made on {device.type!r}: the two "
                f"draw different random numbers and round differently. Make it on {self.device.type!r}, then move it."
            )
        if not is_present(device):
            raise DeferredUseError(
                f"this value must be made on {str(device)!r}, which this process does not have. Here you can inspect a "
                "model that was deferred for this device. Make its values in a process that has such a device."
            )

    def _execute(self, step: Step, env: dict[int, torch.UntypedStorage], device: torch.device) -> None:
        if step.position is not None:
            self._generator(step, device).set_state(self.random.state_at(step.position))
        args, kwargs = self._bind(step, env, device)
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(step.default_dtype)
        try:
            result = step.func(*args, **kwargs)
        finally:
            torch.set_default_dtype(default_dtype)
        outputs = tensors(result)
        for output, ref in zip(outputs, step.outputs, strict=True):
            if ref.storage not in step.creates:
                continue
            if (output.dtype, tuple(output.shape)) != (ref.dtype, ref.size):
                raise ReplayError(
                    f"{step.func} made a {output.dtype} tensor of shape {tuple(output.shape)}, but was recorded as "
                    f"{ref.dtype} of shape {ref.size}: its meta kernel is wrong in this torch build. Construct the "
                    "model with `empty_init=False`."
                )
            if output.stride() != ref.stride:
                # The meta kernel was wrong about the strides, but later steps rely on the recorded ones.
                output = torch.empty_strided(ref.size, ref.stride, dtype=ref.dtype, device=device).copy_(output)
            env[ref.storage] = output.untyped_storage()

    def _bind(
        self, step: Step, env: dict[int, torch.UntypedStorage], device: torch.device
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def real(leaf: Any) -> Any:
            if isinstance(leaf, TensorRef):
                return view(env[leaf.storage], leaf)
            if isinstance(leaf, Constant):
                value = leaf.value()
                return value.to(device) if device != self.device == value.device else value
            # The step names the device that the tensors stand for, but runs on the requested one.
            return device if isinstance(leaf, torch.device) and leaf == self.device else leaf

        return map_leaves(step.args, real), map_leaves(step.kwargs, real)

    def _generator(self, step: Step, device: torch.device) -> Generator:
        explicit = next((arg for arg in (*step.args, *step.kwargs.values()) if isinstance(arg, torch.Generator)), None)
        if explicit is not None:
            return explicit
        generator = default_generator(device)
        if self._borrowed is not None and id(generator) not in self._borrowed:
            # The device has the same kind and another index.
            self._borrowed[id(generator)] = (generator, generator.get_state())
        return generator

    def settle(self) -> None:
        """Give every generator that holds a token its true state, as eager construction would have left it."""
        try:
            with self.plain_torch():
                states = self.random.true_states()
        except Exception:
            # A step cannot be run. No generator may keep a token as its state: its next numbers would be wrong.
            for generator, state in self.random.last_known_states():
                generator.set_state(state)
            raise
        for generator, state in states:
            generator.set_state(state)

    @contextmanager
    def plain_torch(self) -> Iterator[None]:
        """Run aten with torch's modes off, and restore every generator at the end.

        Open it once around many values: an inner call costs nothing.
        """
        if self._borrowed is not None:
            yield
            return
        borrowed = {id(g): (g, g.get_state()) for g in self.random.generators(default_generator(self.device))}
        with plain_modes():
            self._borrowed = borrowed
            try:
                yield
            finally:
                self._borrowed = None
                for generator, state in borrowed.values():
                    generator.set_state(state)


def view(storage: torch.UntypedStorage, ref: TensorRef) -> Tensor:
    """Return the tensor that `ref` describes on a real storage."""
    tensor = torch.empty(0, dtype=ref.dtype, device=storage.device)
    tensor.set_(storage, ref.offset, ref.size, ref.stride)
    if ref.conj:
        tensor = torch._conj(tensor)
    if ref.neg:
        tensor = torch._neg_view(tensor)
    return tensor
