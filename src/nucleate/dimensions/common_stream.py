"""The random stream that the ranks of one group share: all of them draw the same numbers in forward.

The ranks of a group of tensor parallel compute one model together. A dropout on values that all of them hold must drop
the same ones everywhere, also where the script has given each rank a seed of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nucleate.devices import default_generator
from nucleate.dimensions.parts import has_forward, parts_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: The numbers of a hash that are compared, so that an int64 holds each.
_NUM_BYTES = 7


class CommonStream:
    """The agreement of a group of ranks on the states of their random generators.

    Args:
        group: The process group.
        device: The device of this process.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group = group
        self._device = device

    def __deepcopy__(self, memo: object) -> CommonStream:
        """Return the same object: a copy of a model is on the same ranks."""
        return self

    def agree(self, module: nn.Module, _: object = None) -> None:
        """Give all ranks of the group the states of its first rank, if they differ. A hook before forward.

        One small exchange shows whether they differ. A forward that does not train draws nothing, and is left alone.

        Args:
            module: The module whose forward begins.
            _: The arguments of its forward.
        """
        if not (module.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return
        if torch._C._current_graph_task_id() != -1:
            return  # Checkpointing repeats a forward, under the states of the first one.
        self.share()

    def share(self) -> None:
        """Give all ranks of the group the states of its first rank, if they differ. Every rank must call it."""
        import torch.distributed as dist

        generators = [torch.default_generator]
        if self._device.type != "cpu":
            generators.append(default_generator(self._device))  # type: ignore[arg-type]
        states = [generator.get_state() for generator in generators]
        mark = _mark(states)
        # The largest of the marks and of their negatives: equal marks give a pair of equal size.
        marks = torch.tensor([mark, -mark], device=self._device)
        dist.all_reduce(marks, op=dist.ReduceOp.MAX, group=self._group)
        largest, smallest = marks.tolist()
        if largest == -smallest:
            return
        first = dist.get_global_rank(self._group, 0)
        for generator, state in zip(generators, states, strict=True):
            sent = state.to(self._device)
            dist.broadcast(sent, src=first, group=self._group)
            generator.set_state(sent.cpu())


def share_random_stream(model: nn.Module, group: ProcessGroup, device: torch.device) -> None:
    """Let the ranks of a group draw the same random numbers in each forward that trains, as one process does.

    A dimension whose ranks compute one model on the same data calls this function in `enclose`. Otherwise a dropout
    drops other values on each rank if the script has given each rank a seed of its own.

    Args:
        model: The model that `enclose` got.
        group: The ranks, such as `self.mesh.group(self.device.type, self.axes)`.
        device: The device of this process.
    """
    stream = CommonStream(group, device)
    for module in [model] if has_forward(model) else [part for _, part in parts_of(model)]:
        module.register_forward_pre_hook(stream.agree, prepend=True)


def _mark(states: list[Tensor]) -> int:
    digest = hashlib.blake2b(digest_size=_NUM_BYTES)
    for state in states:
        digest.update(ctypes.string_at(state.data_ptr(), state.numel()))
    return int.from_bytes(digest.digest(), "big")
