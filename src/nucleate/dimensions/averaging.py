"""Averages: gradients of parameters that every rank keeps whole, exchanged one by one as soon as each is complete.

DDP and FSDP exchange gradients in groups, and expect that a forward announces each backward. The parameters here are
those that neither takes: parameters that cannot be sharded, and models that have no forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Averaging:
    """The averages of gradients over the ranks that split the data, for any number of models.

    Every rank must use the same parameters in a backward, as under DDP.
    """

    def __init__(self) -> None:
        self._paused: WeakSet[nn.Module] = WeakSet()

    def __reduce__(self) -> tuple[type[Averaging], tuple[()]]:
        # A strategy goes to another process without the models of this one.
        return Averaging, ()

    def add(self, model: nn.Module, parameters: Iterable[nn.Parameter], group: ProcessGroup | None = None) -> None:
        """Average the gradients of some parameters from now on, also of those that are trained only later.

        Args:
            model: The model that has the parameters, which `paused` takes.
            parameters: Parameters that are equal on all ranks of the group.
            group: The ranks; None for all.
        """
        import torch.distributed as dist

        owner = ref(model)

        def average(parameter: Tensor) -> None:
            # A gradient from an earlier exchange is equal on all ranks, so the average of the sum is right too.
            if owner() not in self._paused and parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=group)
                parameter.grad.div_(dist.get_world_size(group))

        for parameter in parameters:
            after_gradient(parameter, average)

    @contextmanager
    def paused(self, model: nn.Module) -> Iterator[None]:
        """Accumulate the gradients of a model inside this context without exchanging them."""
        self._paused.add(model)
        try:
            yield
        finally:
            self._paused.discard(model)


def after_gradient(parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> None:
    """Call a hook whenever the gradient of a parameter is complete, before the hooks that are there.

    Args:
        parameter: The parameter, which may be trained only later.
        hook: The hook; the user's own hooks see its result, as the optimizer does.
    """
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return
    trained = parameter.requires_grad
    # torch registers hooks only on trained parameters, but a parameter that is frozen keeps them.
    handle = parameter.requires_grad_().register_post_accumulate_grad_hook(hook)
    parameter.requires_grad_(trained)
    hooks = parameter._post_accumulate_grad_hooks
    hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]


def broadcast_buffers(module: nn.Module, _: object = None) -> None:
    """Give the buffers of a module rank 0's values, before a forward with gradients, as DDP does. A hook.

    Args:
        module: The module.
        _: The arguments of its forward.
    """
    import torch.distributed as dist

    if not torch.is_grad_enabled() or not dist.is_initialized():
        return
    for buffer in module.buffers():
        # `data` has a version counter of its own: an earlier forward may still need the buffer for its backward.
        value = buffer.data.contiguous()
        # As bytes: backends lack some dtypes.
        dist.broadcast(value.view(-1).view(torch.uint8), src=0)
        if value.data_ptr() != buffer.data_ptr():
            buffer.data.copy_(value)
