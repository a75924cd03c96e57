"""Generator states: the tensors that `get_rng_state` returns to a constructor, which hold a token instead of a state.

Inside the recording a token works like the state that it stands for, and costs nothing. A token gets the bytes of the
true state when somebody reads it, or if somebody still holds it when recording ends.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from nucleate.deferred.active import active_records
from nucleate.deferred.inference_mode import ordinary
from nucleate.deferred.replay.replayer import Replayer
from nucleate.devices.kinds import current_accelerator


class GeneratorStates:
    """The generator states that were handed out during a recording.

    Args:
        replayer: The replayer, which has the random program.
    """

    def __init__(self, replayer: Replayer) -> None:
        self._replayer = replayer
        self._handed_out: list[weakref.ref[Tensor]] = []

    def notice(self, state: Tensor) -> None:
        """Remember a state that was handed out, as long as somebody holds it."""
        self._handed_out.append(weakref.ref(state))

    def settle(self, tensor: Tensor) -> None:
        """If a real tensor holds a token, replace the token by the true state."""
        sizes = self._replayer.random.state_sizes
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() not in sizes or tensor.is_meta:
            return
        with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
            if not tensor.is_contiguous() or tensor.device.type != "cpu":
                return
            random = self._replayer.random
            position = random.position_of(tensor)
            if position is not None:
                ordinary(tensor).copy_(random.state_at(position))

    def settle_all(self, held: Iterable[Tensor]) -> None:
        """Settle the handed-out states that are alive, and the tensors in `held`."""
        for state in (*(reference() for reference in self._handed_out), *held):
            if state is not None:
                self.settle(state)
        self._handed_out.clear()


def install_states(stack: ExitStack) -> None:
    """Patch the functions that hand out states of default generators until the stack is closed."""
    _patch(stack, torch.random, (torch,))
    accelerator = current_accelerator()
    if accelerator is not None:
        # A device's module may keep these functions in a submodule, such as `torch.cuda.random`.
        module: Any = torch.get_device_module(accelerator)
        _patch(stack, getattr(module, "random", module), (module,))


def _patch(stack: ExitStack, owner: Any, copies: tuple[Any, ...]) -> None:
    original = owner.get_rng_state

    @functools.wraps(original)
    def get_rng_state(*args: Any, **kwargs: Any) -> Tensor:
        state: Tensor = original(*args, **kwargs)
        for record in active_records():
            record.notice_state(state)
        return state

    for place in {id(place): place for place in (owner, *copies)}.values():
        stack.callback(setattr, place, "get_rng_state", place.get_rng_state)
        place.get_rng_state = get_rng_state
