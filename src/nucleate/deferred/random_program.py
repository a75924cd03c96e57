"""The random program: which random step follows which, and the generator's true state at each.

While a model is recorded no random number is drawn. After each random step the generator is put into a
*token* state, which names a `Position`; the next random step looks the current state up. A state that is no
token means that somebody seeded the generator, and starts a new chain. So `manual_seed`, `fork_rng`,
`get_rng_state`/`set_rng_state` and explicit generators work inside a constructor as they are.

The true state at a position is the state at the start of its chain, advanced by the steps before it. How a
state is advanced over one step is the only thing that `advance` (given by `replay.py`) decides.
"""

from __future__ import annotations

import ctypes
import hashlib
import weakref
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nucleate.deferred.tape import Step

#: Known states are kept this many drawn elements apart, so that reaching any position draws at most as many.
STATE_SPACING = 1 << 16
#: How many states between those are remembered; 5 KB each.
NUM_RECENT = 256

# A CPU generator's state (aten/src/ATen/CPUGeneratorImpl.cpp, torch 2.13) is the seed (8 bytes), two ints, the
# index of the next word (8), then 624 words of 8 bytes of which the engine keeps the lower four. A token replaces
# the first two words, which leaves `initial_seed()` and the validity checks of `set_state` as they are.
_CPU_WORDS = 24
_TOKEN_MARK = 0x6E75636C  # "nucl"
_TOKEN_BYTES = 16

# Tokens are unique in the process, and a program recognizes those of the others.
_numbers = count()
_programs: weakref.WeakSet[RandomProgram] = weakref.WeakSet()


class Position:
    """A place between two random steps of one generator.

    Attributes:
        parent: The position before the step that leads here, or None at the start of a chain.
        step: The step that leads here from `parent`.
        state: The generator's true state here, where it is known.
        is_anchor: Whether the state is kept for good. Others, passed on the way, are forgotten after a while.
    """

    __slots__ = ("is_anchor", "parent", "state", "step")

    def __init__(self, parent: Position | None, step: Step | None, state: Tensor | None) -> None:
        self.parent = parent
        self.step = step
        self.state = state
        self.is_anchor = state is not None

    def describe(self) -> tuple[str, int]:
        """Return something equal on all ranks that stand at the same place: the chain's start and the last step."""
        if self.parent is None:
            assert self.state is not None
            content = ctypes.string_at(self.state.data_ptr(), self.state.numel())
            return hashlib.blake2b(content, digest_size=8).hexdigest(), -1
        return "", self.step.index if self.step is not None else -1


class RandomProgram:
    """The chains of random steps of one deferred construction, over all generators it used.

    Args:
        advance: `(state, step) -> state`: what the generator's state is after the step, given it before.
    """

    def __init__(self, advance: Callable[[Tensor, Step], Tensor]) -> None:
        self._advance = advance
        self._tokens: dict[bytes, Position] = {}
        _programs.add(self)
        self._generators: dict[int, torch.Generator] = {}
        self._recent: deque[Position] = deque()

    def generators(self, default: torch.Generator) -> list[torch.Generator]:
        """Return `default` and every generator that a random step drew from."""
        return list({id(default): default, **self._generators}.values())

    def locate(self, generator: torch.Generator) -> Position:
        """Return the position where the generator stands now."""
        self._generators[id(generator)] = generator
        state = generator.get_state()
        key = _key(state)
        position = self._tokens.get(key)
        if position is not None:
            return position
        for other in list(_programs):
            # A token of a recording around this one, or in another thread: its true state starts our chain.
            if key in other._tokens:
                return Position(None, None, other.state_at(other._tokens[key]))
        return Position(None, None, state)

    def follow(self, generator: torch.Generator, position: Position, step: Step, state: Tensor | None = None) -> None:
        """Put the generator behind a random step that stands at `position`.

        Args:
            generator: The generator that the step draws from.
            position: Where the step stands.
            step: The step.
            state: The true state behind it, where the step was really run.
        """
        token = _token(generator, next(_numbers))
        self._tokens[_key(token)] = Position(position, step, state)
        generator.set_state(token)

    def state_at(self, position: Position) -> Tensor:
        """Return the generator's true state at a position, drawing from the nearest known one."""
        chain: list[Position] = []
        known = position
        while known.state is None:
            chain.append(known)
            assert known.parent is not None
            known = known.parent
        state = known.state
        passed = 0
        for place in reversed(chain):
            step = place.step
            assert step is not None
            state = self._advance(state, step)
            passed += max((ref.numel for ref in step.outputs), default=0)
            if passed >= STATE_SPACING:
                place.state, place.is_anchor, passed = state, True, 0
        if not position.is_anchor:
            # What is asked for next usually follows this one.
            position.state = state
            self._recent.append(position)
            if len(self._recent) > NUM_RECENT:
                old = self._recent.popleft()
                if not old.is_anchor and old is not position:
                    old.state = None
        return state

    def true_states(self) -> list[tuple[torch.Generator, Tensor]]:
        """Return the true state of every generator that holds a token."""
        positions = ((g, self._tokens.get(_key(g.get_state()))) for g in self._generators.values())
        return [(generator, self.state_at(position)) for generator, position in positions if position is not None]


def default_generator(device: torch.device) -> torch.Generator:
    """Return the generator that factories and in-place fills on `device` use by default."""
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        return torch.cuda.default_generators[index]
    return torch.default_generator


def _key(state: Tensor) -> bytes:
    """Return the bytes of a state that tell a token."""
    # `bytes(storage)` would go byte by byte through Python.
    offset = _CPU_WORDS if state.numel() > _TOKEN_BYTES else 0
    return ctypes.string_at(state.data_ptr() + offset, _TOKEN_BYTES)


def _token(generator: torch.Generator, number: int) -> Tensor:
    state = generator.get_state()
    if generator.device.type == "cpu":
        words = state[_CPU_WORDS : _CPU_WORDS + _TOKEN_BYTES].view(torch.int64)
        words[0] = _TOKEN_MARK
        words[1] = number
    else:
        # Philox (aten/src/ATen/cuda/CUDAGeneratorImpl.cpp): seed and offset, 8 bytes each.
        words = state.view(torch.int64)
        words[0] = (_TOKEN_MARK << 31) + number
        words[1] = 0
    return state
