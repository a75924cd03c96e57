"""The random program: which random step follows which, and the generator's true state at each.

While a model is recorded no random number is drawn. After each random step the generator is put into a
*token* state, which names a `Position`; the next random step looks the current state up. A state that is no
token means that somebody seeded the generator, and starts a new run. So `manual_seed`, `fork_rng`,
`get_rng_state`/`set_rng_state` and explicit generators work inside a constructor as they are.

A `Run` is a stretch of steps of which each tells beforehand how far it moves the generator, so a position is a
number of draws from the run's start, and any of them is reached in one jump. A step that does not tell (a
rejection loop) ends a run, and is executed where the state behind it is needed.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
import weakref
from collections import deque
from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor

from nucleate.deferred.randomness import streams
from nucleate.deferred.randomness.mersenne_twister import Workspace
from nucleate.deferred.tape.steps import Position, Run, Step
from nucleate.deferred.torch_modes import plain_modes
from nucleate.devices.generators import AbsentGenerator, Generator

#: How many states on the way are remembered; 5 KB each.
NUM_REMEMBERED = 256

# A CPU generator's state (aten/src/ATen/CPUGeneratorImpl.cpp, torch 2.13) is the seed (8 bytes), two ints, the
# index of the next word (8), then 624 words of 8 bytes of which the engine keeps the lower four. A token replaces
# the first two words, which leaves `initial_seed()` and the validity checks of `set_state` as they are.
_CPU_WORDS = 24
#: Bytes of such a state.
CPU_STATE_BYTES = 5056
# How other devices keep their states is their own business. Where it is a seed and an offset, 8 bytes each, a token
# is an offset that nobody gets to, which leaves `initial_seed()` as it is; else it is what a seed of ours leads to.
_TOKEN_MARK = 0x6E75636C  # "nucl"
_TOKEN_BYTES = 16

# Tokens are unique in the process, and a program recognizes those of the others.
_numbers = count()
_programs: weakref.WeakSet[RandomProgram] = weakref.WeakSet()
# Programs whose tapes have been joined share runs.
_lock = threading.RLock()


class RandomProgram:
    """The runs of one deferred construction, over all generators it used.

    Args:
        execute: `(state, step) -> state`: runs a random step that does not tell what it draws; given the generator's
            state before it, returns the one behind it.
    """

    def __init__(self, execute: Callable[[Tensor, Step], Tensor]) -> None:
        self._execute = execute
        self._tokens: dict[bytes, Position] = {}
        self._generators: dict[int, Generator] = {}
        self._remembered: deque[tuple[Run, int]] = deque()
        self._workspace = Workspace()
        # The generator that was located last, and a copy of its state that nobody else holds.
        self._seen: tuple[Generator | None, Tensor | None] = (None, None)
        #: How many bytes the states have that it met.
        self.state_sizes = {CPU_STATE_BYTES}
        _programs.add(self)

    def generators(self, default: Generator) -> list[Generator]:
        """Return `default` and every generator that a random step drew from."""
        return list({id(default): default, **self._generators}.values())

    def locate(self, generator: Generator) -> Position:
        """Return the position where the generator stands now."""
        self._generators[id(generator)] = generator
        state = generator.get_state()
        self._seen = (generator, state)
        self.state_sizes.add(state.numel())
        key = _key(state, generator.device.type)
        position = self._tokens.get(key)
        if position is not None:
            return position
        for other in list(_programs):
            # A token of a recording around this one, or in another thread: its true state starts our run.
            if key in other._tokens:
                state = other.state_at(other._tokens[key])
                break
        return Position(Run(generator.device.type, state.clone()), 0)

    def position_of(self, state: Tensor) -> Position | None:
        """Return the position that a token stands for, or None for any other state."""
        if state.numel() == CPU_STATE_BYTES and (position := self._tokens.get(_key(state, "cpu"))) is not None:
            return position
        return self._tokens.get(_key(state, ""))

    def follow(self, generator: Generator, position: Position, step: Step, state: Tensor | None = None) -> None:
        """Put the generator behind a random step that stands at `position`.

        Args:
            generator: The generator that the step draws from.
            position: Where the step stands.
            step: The step.
            state: The true state behind it, where the step was really executed.
        """
        distance = streams.distance(step, generator.device) if state is None else None
        if distance is not None:
            after = Position(position.run, position.offset + distance)
        else:
            after = Position(Run(generator.device.type, state, (position, step)), 0)
        seen, before = self._seen
        self._seen = (None, None)
        key = _put_token(generator, next(_numbers), before if seen is generator else None)
        self._tokens[key] = after

    def state_at(self, position: Position) -> Tensor:
        """Return the generator's true state at a position."""
        with _lock, plain_modes():
            offset, state = self.nearest(position)
            if offset != position.offset:
                state = streams.moved(position.run.device, state, position.offset - offset, self._workspace)
                self.remember(position.run, position.offset, state)
            return state

    def nearest(self, position: Position) -> tuple[int, Tensor]:
        """Return the last known state at or before a position, and its offset in the position's run."""
        with _lock, plain_modes():
            unknown = [position.run]
            while unknown[-1].state is None:
                assert unknown[-1].behind is not None
                unknown.append(unknown[-1].behind[0].run)
            for run in reversed(unknown):
                if run.state is None:
                    assert run.behind is not None
                    run.state = self._execute(self.state_at(run.behind[0]), run.behind[1])
            return position.run.nearest(position.offset)

    def remember(self, run: Run, offset: int, state: Tensor) -> None:
        """Keep a state for what is asked for next, which usually lies behind it."""
        with _lock:
            if run.nearest(offset)[0] == offset:
                return
            run.remember(offset, state)
            self._remembered.append((run, offset))
            if len(self._remembered) > NUM_REMEMBERED:
                old, old_offset = self._remembered.popleft()
                old.forget(old_offset)

    def last_known_states(self) -> list[tuple[Generator, Tensor]]:
        """Return a state for every generator that holds a token, for when its true one cannot be found."""
        return [(generator, _start(position.run)) for generator, position in self._held_positions()]

    def true_states(self) -> list[tuple[Generator, Tensor]]:
        """Return the true state of every generator that holds a token."""
        # All at once: making a state draws from the others.
        return [
            # Nothing can be run on a device that is absent, and nobody can draw from its generator.
            (generator, _start(position.run) if isinstance(generator, AbsentGenerator) else self.state_at(position))
            for generator, position in self._held_positions()
        ]

    def _held_positions(self) -> list[tuple[Generator, Position]]:
        found = [(g, self._tokens.get(_key(g.get_state(), g.device.type))) for g in self._generators.values()]
        return [(generator, position) for generator, position in found if position is not None]


def _start(run: Run) -> Tensor:
    """Return the state at the start of a run, or of the last one before it of which it is known."""
    while run.state is None:
        assert run.behind is not None
        run = run.behind[0].run
    return run.state


def _key(state: Tensor, device_type: str) -> bytes:
    """Return the bytes of a state that tell a token."""
    # `bytes(storage)` would go byte by byte through Python.
    if device_type == "cpu":
        return ctypes.string_at(state.data_ptr() + _CPU_WORDS, _TOKEN_BYTES)
    content = ctypes.string_at(state.data_ptr(), state.numel())
    return content if len(content) <= _TOKEN_BYTES else hashlib.blake2b(content, digest_size=_TOKEN_BYTES).digest()


def _put_token(generator: Generator, number: int, state: Tensor | None) -> bytes:
    """Put a generator into a state of our own, and return the bytes that tell it.

    Args:
        generator: The generator.
        number: Makes the state unique.
        state: A state of the generator that may be written to, if there is one already.
    """
    state = generator.get_state() if state is None else state
    if generator.device.type != "cpu":
        if not _put_far(generator, number, state):
            generator.manual_seed((_TOKEN_MARK << 31) + number)
        return _key(generator.get_state(), generator.device.type)
    words = state[_CPU_WORDS : _CPU_WORDS + _TOKEN_BYTES].view(torch.int64)
    words[0] = _TOKEN_MARK
    words[1] = number
    generator.set_state(state)
    return _key(state, "cpu")


def _put_far(generator: Generator, number: int, state: Tensor) -> bool:
    """Put a generator that keeps a seed and an offset at an offset of our own, and return whether it is such a one."""
    if state.numel() != _TOKEN_BYTES:
        return False
    # Written by address, which no mode sees. CUDA's are multiples of 4 (`set_state` in CUDAGeneratorImpl.cpp, 2.13).
    ctypes.c_int64.from_address(state.data_ptr() + 8).value = (_TOKEN_MARK << 31) + 4 * number
    try:
        generator.set_state(state)
    except RuntimeError:
        return False
    return _key(generator.get_state(), generator.device.type) == _key(state, generator.device.type)
