"""Second backward passes, such as those of gradient penalties, through parameters that FSDP gathers and frees.

A backward with `create_graph=True` makes a graph that uses the gathered parameters. FSDP has no hook before that graph
runs, so it could not gather them again. They stay gathered until the next backward without `create_graph` has ended.

The file reads private attributes of FSDP2 (torch/distributed/fsdp/_fully_shard/_fsdp_state.py and _fsdp_param_group.py,
2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nucleate.dimensions.averaging import after_gradient


class SecondBackward:
    """The gathered parameters of one sharded model that a second backward may need.

    Args:
        groups: FSDP's parameter groups.
        root: Returns the model, or None if nobody uses the whole model any more.
        reshard: Frees all gathered parameters.
    """

    def __init__(self, groups: Sequence[Any], root: Callable[[], Any], reshard: Callable[[], None]) -> None:
        self._groups, self._root, self._reshard = groups, root, reshard
        # For each group, its settings before; None if nothing is kept.
        self._kept: list[tuple[Any, bool]] | None = None
        self._watched: dict[int, Tensor] = {}
        self._is_ending = False

    @property
    def is_pending(self) -> bool:
        """Whether parameters stay gathered."""
        return self._kept is not None

    def before_backward(self) -> None:
        """Keep parameters if this backward makes a graph; else free them when it ends."""
        if torch.is_grad_enabled():  # True in a backward only with `create_graph=True`.
            self._keep()
        elif self._kept is not None:
            self._end_with_backward()

    def release(self) -> None:
        """Let FSDP free parameters again, by its own rules."""
        if self._kept is not None:
            for group, settings in zip(self._groups, self._kept, strict=True):
                group.post_forward_mesh_info, group.reshard_after_backward = settings
        self._kept, self._is_ending = None, False

    def _keep(self) -> None:
        self._is_ending = False
        if self._kept is not None:
            return
        self._kept = [(group.post_forward_mesh_info, group.reshard_after_backward) for group in self._groups]
        for group in self._groups:
            group.reshard_after_backward = False
            # Parameters that are spread over a smaller mesh now are gathered over that mesh in this backward.
            if not group.is_sharded_post_forward:
                group.post_forward_mesh_info = None
            for param in group.fsdp_params:
                gathered = getattr(param, "_unsharded_param", None)
                if gathered is not None and id(gathered) not in self._watched:
                    self._watched[id(gathered)] = gathered
                    after_gradient(gathered, self._on_gradient)

    def _on_gradient(self, _: Tensor) -> None:
        """Let FSDP exchange the gradients of a second backward, which need not pass through the output of a unit."""
        if self._kept is not None and not torch.is_grad_enabled():
            self._end_with_backward()
            root = self._root()
            if root is not None:
                root._get_fsdp_state()._register_root_post_backward_final_callback()

    def _end_with_backward(self) -> None:
        """Call `_end` when this backward ends, before FSDP's own callback, which is queued later."""
        if not self._is_ending:
            self._is_ending = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

        for group in self._groups:
            gradients = [p.unsharded_param.grad for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
            # The graph of the first backward may run after the unit's own backward, in which FSDP has exchanged the
            # gradients so far. With this state its callback exchanges the rest.
            if any(gradient is not None for gradient in gradients):
                group._training_state = TrainingState.IDLE
        self.release()
        self._reshard()
