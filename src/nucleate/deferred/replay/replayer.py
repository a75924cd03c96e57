"""Replay: make the value of a storage from the steps that still matter to it, and from nothing else.

`backward_slice` finds, for one storage, the steps that its value depends on; writes that a later full
overwrite makes dead are left out, so that a parameter that was initialized twice costs one initialization.
`Replayer` runs such a slice on a real device, each random step from its own generator state, and frees every
intermediate as soon as nothing later in the slice needs it.
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
    """Return the steps that the content of `storages` depends on, in the order they were recorded.

    Args:
        tape: The tape.
        storages: Storages whose content is wanted.
        end: Look at the tape as it was before the step with this index; by default the whole tape.
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
    """Runs slices of one tape.

    Args:
        tape: The tape.
        device: The device that deferred tensors stand for while recording.
    """

    def __init__(self, tape: Tape, device: torch.device) -> None:
        self.tape = tape
        self.device = device
        # Weakly, so that a record goes with its last tensor and not when the garbage collector comes by.
        replayer = weakref.proxy(self)
        self.random = RandomProgram(lambda state, step: replayer.behind(state, step))
        # The generators that are given back where `plain_torch` ends, and their states; None outside.
        self._borrowed: dict[int, tuple[Generator, Tensor]] | None = None

    def storage(
        self, number: int, device: torch.device, scratch: torch.UntypedStorage | None = None
    ) -> torch.UntypedStorage:
        """Make the content of a storage of the tape. The generators are left as they were.

        Args:
            number: Which storage.
            device: Where to make it.
            scratch: Memory on `device`, large enough, that may be used for it instead of new memory.
        """
        with self.plain_torch():
            return self._run(backward_slice(self.tape, [number]), [number], device, scratch)[number]

    def contents(
        self, steps: list[Step], storages: Sequence[int], device: torch.device | None = None
    ) -> dict[int, torch.UntypedStorage]:
        """Return what a slice makes of several storages, on a device or on the one that they stand for.

        Where that is absent, what depends on no random number is made on the CPU: somebody wants to look at it.
        """
        with self.plain_torch():
            return self._run(steps, storages, device or self._looked_at_on(steps))

    def execute_unrecorded(self, step: Step) -> tuple[tuple[Any, ...], dict[str, Any], Any, Tensor | None]:
        """Run a step that is not on the tape yet, on real values.

        Returns:
            Its real positional arguments, keyword arguments and result, and the generator's state behind it if it
            is random and the device is there.
        """
        with self.plain_torch():
            needed = sorted({*step.reads, *step.writes})
            before = backward_slice(self.tape, needed)
            where = self._looked_at_on(before)
            env = self._run(before, needed, where)
            args, kwargs = self._bind(step, env, where)
            generator = None
            if where != self.device:
                # Only the geometry of random numbers is right, and the CPU's generator is given back.
                with torch.random.fork_rng(devices=()):
                    return args, kwargs, step.func(*args, **kwargs), None
            if step.position is not None:
                generator = self._generator(step, self.device)
                generator.set_state(self.random.state_at(step.position))
            result = step.func(*args, **kwargs)
            return args, kwargs, result, None if generator is None else generator.get_state()

    def behind(self, state: Tensor, step: Step) -> Tensor:
        """Return the generator's state behind a random step by executing it, given the state before it."""
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
            # A zero-size storage needs no step to be whole.
            if storage not in env and self.tape.size_bytes(storage) == 0:
                env[storage] = torch.UntypedStorage(0, device=device)
        return env

    def _looked_at_on(self, steps: list[Step]) -> torch.device:
        """Return where a constructor's questions about values are answered."""
        host = torch.device("cpu")
        return host if self._is_looked_at(steps, host) else self.device

    def _is_looked_at(self, steps: list[Step], device: torch.device) -> bool:
        is_absent = device.type == "cpu" != self.device.type and not is_present(self.device)
        return is_absent and all(step.position is None for step in steps)

    def _refuse_device(self, device: torch.device) -> None:
        """Raise where the recipes cannot be made: on another kind of device, or on one that is not there.

        Raises:
            DeferredUseError: See above.
        """
        if device.type != self.device.type:
            raise DeferredUseError(
                f"this recipe was recorded for {self.device.type!r} and cannot be made on {device.type!r}: the two "
                f"draw other random numbers and round otherwise. Make it on {self.device.type!r} and move it there."
            )
        if not is_present(device):
            raise DeferredUseError(
                f"this value would have to be made on {str(device)!r}, which this process does not have. A model that "
                "was deferred for it can be looked at here, and made where there is such a device."
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
                # A meta kernel that is wrong about strides: later steps count on the recorded ones.
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
            # Recorded for the device that the tensors stand for; made on the one asked for.
            return device if isinstance(leaf, torch.device) and leaf == self.device else leaf

        return map_leaves(step.args, real), map_leaves(step.kwargs, real)

    def _generator(self, step: Step, device: torch.device) -> Generator:
        explicit = next((arg for arg in (*step.args, *step.kwargs.values()) if isinstance(arg, torch.Generator)), None)
        if explicit is not None:
            return explicit
        generator = default_generator(device)
        if self._borrowed is not None and id(generator) not in self._borrowed:
            # A device of the same kind with another index.
            self._borrowed[id(generator)] = (generator, generator.get_state())
        return generator

    def settle(self) -> None:
        """Give every generator that holds a token its true state, as eager construction would have left it."""
        try:
            with self.plain_torch():
                states = self.random.true_states()
        except Exception:
            # A step cannot be run. No generator may be left with a state that is none: the next numbers would be too.
            for generator, state in self.random.last_known_states():
                generator.set_state(state)
            raise
        for generator, state in states:
            generator.set_state(state)

    @contextmanager
    def plain_torch(self) -> Iterator[None]:
        """Run aten as if nobody had changed torch's modes, and give every generator back as it was.

        Entered once around many values, it costs once.
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
