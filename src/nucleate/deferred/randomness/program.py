"""The random program: the order of the random steps, and the generator's true state at each step.

While a model is recorded, no random number is drawn. After each random step, the generator is put into a *token* state,
which stands for a `Position`. The next random step looks up the current state. If the state is not a token, somebody
has seeded the generator, and a new run begins. So `manual_seed`, `fork_rng`, `get_rng_state`/`set_rng_state` and
explicit generators work inside a constructor without changes.

A `Run` is a sequence of steps, each with a number of draws that is known beforehand. So a position is a number of draws
from the run's start, and one jump reaches any position. A step whose number of draws is not known (a rejection loop)
ends a run. Such a step is executed if the state behind it is needed.
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

#: The number of states inside of runs that are remembered; each takes 5 KB.
NUM_REMEMBERED = 256

# A CPU generator's state (aten/src/ATen/CPUGeneratorImpl.cpp, torch 2.13) is the seed (8 bytes), two ints, the index of
# the next word (8), then 624 words of 8 bytes, from which the engine keeps the lower four. A token replaces the first
# two words, so `initial_seed()` and the validity checks of `set_state` are not affected.
_CPU_WORDS = 24
#: The size of such a state in bytes.
CPU_STATE_BYTES = 5056
# Other devices have other states. If a state is a seed and an offset of 8 bytes each, a token is an offset that nobody
# reaches, so `initial_seed()` is not affected. Else a token is the state that a seed of ours leads to.
_TOKEN_MARK = 0x6E75636C  # "nucl"
_TOKEN_BYTES = 16

# Tokens are unique in the process, and each program recognizes the tokens of the others.
_numbers = count()
_programs: weakref.WeakSet[RandomProgram] = weakref.WeakSet()
# Programs whose tapes have been joined share runs.
_lock = threading.RLock()


class RandomProgram:
    """The runs of one deferred construction, over all generators it used.

    Args:
        execute: `(state, step) -> state`: runs a random step whose number of draws is not known. It gets the
            generator's state before the step, and returns the state behind it.
    """

    def __init__(self, execute: Callable[[Tensor, Step], Tensor]) -> None:
        self._execute = execute
        self._tokens: dict[bytes, Position] = {}
        self._generators: dict[int, Generator] = {}
        self._remembered: deque[tuple[Run, int]] = deque()
        self._workspace = Workspace()
        # The last generator that `locate` got, and a copy of its state that nobody else holds.
        self._seen: tuple[Generator | None, Tensor | None] = (None, None)
        #: The sizes, in bytes, of the generator states that it has met.
        self.state_sizes = {CPU_STATE_BYTES}
        _programs.add(self)

    def generators(self, default: Generator) -> list[Generator]:
        """Return `default` and every generator that a random step drew from."""
        return list({id(default): default, **self._generators}.values())

    def locate(self, generator: Generator) -> Position:
        """Return the position of the generator now."""
        self._generators[id(generator)] = generator
        state = generator.get_state()
        self._seen = (generator, state)
        self.state_sizes.add(state.numel())
        key = _key(state, generator.device.type)
        position = self._tokens.get(key)
        if position is not None:
            return position
        for other in list(_programs):
            # The token of a recording around this one, or in another thread. Its true state starts our run.
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
        """Move the generator to the position behind a random step.

        Args:
            generator: The generator that the step draws from.
            position: The position of the step.
            step: The step.
            state: The true state behind the step, if the step was executed.
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
        """Keep a state for the next request, which is usually for a later position."""
        with _lock:
            if run.nearest(offset)[0] == offset:
                return
            run.remember(offset, state)
            self._remembered.append((run, offset))
            if len(self._remembered) > NUM_REMEMBERED:
                old, old_offset = self._remembered.popleft()
                old.forget(old_offset)

    def last_known_states(self) -> list[tuple[Generator, Tensor]]:
        """Return the last known state of every generator that holds a token, in case its true state cannot be found."""
        return [(generator, _start(position.run)) for generator, position in self._held_positions()]

    def true_states(self) -> list[tuple[Generator, Tensor]]:
        """Return the true state of every generator that holds a token."""
        # All states before the caller sets any, because making one state draws from other generators.
        return [
            # Nothing can run on an absent device, and nobody can draw from its generator.
            (generator, _start(position.run) if isinstance(generator, AbsentGenerator) else self.state_at(position))
            for generator, position in self._held_positions()
        ]

    def _held_positions(self) -> list[tuple[Generator, Position]]:
        found = [(g, self._tokens.get(_key(g.get_state(), g.device.type))) for g in self._generators.values()]
        return [(generator, position) for generator, position in found if position is not None]


def _start(run: Run) -> Tensor:
    """Return the state at the start of a run, or at the start of the last run before it whose state is known."""
    while run.state is None:
        assert run.behind is not None
        run = run.behind[0].run
    return run.state


def _key(state: Tensor, device_type: str) -> bytes:
    """Return the bytes of a state that identify a token."""
    # `bytes(storage)` would handle each byte in Python.
    if device_type == "cpu":
        return ctypes.string_at(state.data_ptr() + _CPU_WORDS, _TOKEN_BYTES)
    content = ctypes.string_at(state.data_ptr(), state.numel())
    return content if len(content) <= _TOKEN_BYTES else hashlib.blake2b(content, digest_size=_TOKEN_BYTES).digest()


def _put_token(generator: Generator, number: int, state: Tensor | None) -> bytes:
    """Put a generator into a token state, and return the bytes that identify the token.

    Args:
        generator: The generator.
        number: A number that makes the state unique.
        state: A state of the generator that may be written to, or None.
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
    """Put a token's offset into a generator that keeps a seed and an offset; return False for any other generator."""
    if state.numel() != _TOKEN_BYTES:
        return False
    # Write by address: no mode sees it. CUDA's offsets are multiples of 4 (`set_state` in CUDAGeneratorImpl.cpp, 2.13).
    ctypes.c_int64.from_address(state.data_ptr() + 8).value = (_TOKEN_MARK << 31) + 4 * number
    try:
        generator.set_state(state)
    except RuntimeError:
        return False
    return _key(generator.get_state(), generator.device.type) == _key(state, generator.device.type)
