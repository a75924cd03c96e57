"""Handing over: from a deferred tensor, whose guard is taken off, to the value that takes its place.

In between, a strategy shards plain meta tensors. Where it fails there, a mark tells them from tensors that were built
on the meta device by hand, which have no value to lose.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_NAME = "_nucleate_released"


def mark_released(tensor: Tensor) -> None:
    """Mark a tensor whose guard was taken off for a strategy."""
    tensor.__dict__[_NAME] = True


def unmark_released(tensor: Tensor) -> None:
    """Take the mark off."""
    tensor.__dict__.pop(_NAME, None)


def is_released(tensor: Tensor) -> bool:
    """Return whether a tensor has the mark."""
    return _NAME in tensor.__dict__


def swap(tensor: Tensor, value: Tensor, by: Callable[[Tensor, Tensor], object] = torch.utils.swap_tensors) -> None:
    """Give a tensor the inside of another one, for everybody who refers to it, and keep its hooks.

    Args:
        tensor: The tensor that others refer to.
        value: What it becomes; afterwards it is what the tensor was.
        by: Swaps the two.

    Raises:
        RuntimeError: torch refuses to swap them. Nothing is changed then.
    """
    hooks = tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)
    by(tensor, value)
    # Hooks belong to the autograd side of a tensor, which is swapped away.
    if hooks[0]:
        tensor._backward_hooks = hooks[0]
    if hooks[1]:
        tensor._post_accumulate_grad_hooks = hooks[1]
