"""The handover from a deferred tensor, whose guard is removed, to the value that takes its place.

In between, a strategy shards plain meta tensors. If the strategy fails, a mark distinguishes these tensors from tensors
that the user built on the meta device, which have no value to lose.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_NAME = "_nucleate_released"


def mark_released(tensor: Tensor) -> None:
    """Mark a tensor whose guard was removed for a strategy."""
    tensor.__dict__[_NAME] = True


def unmark_released(tensor: Tensor) -> None:
    """Remove the mark."""
    tensor.__dict__.pop(_NAME, None)


def is_released(tensor: Tensor) -> bool:
    """Return whether a tensor has the mark."""
    return _NAME in tensor.__dict__


def swap(tensor: Tensor, value: Tensor, by: Callable[[Tensor, Tensor], object] = torch.utils.swap_tensors) -> None:
    """Give a tensor the content of another one, for all references to the tensor, and keep its hooks.

    Args:
        tensor: The tensor that others refer to.
        value: The new content. Afterwards this object has the former content of the tensor.
        by: The function that swaps the two.

    Raises:
        RuntimeError: torch refuses to swap them. Then nothing has changed.
    """
    hooks = tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)
    by(tensor, value)
    # Hooks belong to the autograd data of a tensor, which the swap moves to the other object.
    if hooks[0]:
        tensor._backward_hooks = hooks[0]
    if hooks[1]:
        tensor._post_accumulate_grad_hooks = hooks[1]
