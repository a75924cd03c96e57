"""Swaps the inside of two tensors, so that everybody who refers to one of them sees the other's memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def swap(tensor: Tensor, value: Tensor, by: Callable[[Tensor, Tensor], object] = torch.utils.swap_tensors) -> None:
    """Give a tensor the inside of another one, and keep its hooks.

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
