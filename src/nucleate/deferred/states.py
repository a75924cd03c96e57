"""Generator states that a constructor takes, which hold a token instead of a state.

Inside the recording a token is as good as the state it stands for, and costs nothing. One that somebody looks into, or
that is still held when recording ends, is given the true state's bytes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from nucleate.deferred.active import active_records
from nucleate.deferred.replay import Replayer


class States:
    """The generator states that were handed out while something is recorded.

    Args:
        replayer: Has the random program.
    """

    def __init__(self, replayer: Replayer) -> None:
        self._replayer = replayer
        self._handed_out: list[weakref.ref[Tensor]] = []

    def notice(self, state: Tensor) -> None:
        """Remember a state that was handed out, as long as somebody holds it."""
        self._handed_out.append(weakref.ref(state))

    def settle(self, tensor: Tensor) -> None:
        """If a real tensor holds a token, let it hold the true state."""
        sizes = self._replayer.random.state_sizes
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() not in sizes or tensor.is_meta:
            return
        with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
            if not tensor.is_contiguous() or tensor.device.type != "cpu":
                return
            random = self._replayer.random
            position = random.position_of(tensor)
            if position is not None:
                tensor.copy_(random.state_at(position))

    def settle_all(self, held: Iterable[Tensor]) -> None:
        """Settle what was handed out and lives, and `held`."""
        for state in (*(reference() for reference in self._handed_out), *held):
            if state is not None:
                self.settle(state)
        self._handed_out.clear()


def install_states(stack: ExitStack) -> None:
    """Patch the functions that hand out states of the default generator until the stack is closed."""
    original = torch.random.get_rng_state

    def get_rng_state() -> Tensor:
        state = original()
        for record in active_records():
            record.recorder.states.notice(state)
        return state

    for owner in (torch, torch.random):
        stack.callback(setattr, owner, "get_rng_state", original)
        owner.get_rng_state = get_rng_state  # type: ignore[attr-defined]
