"""Gradient clipping for any mix of plain and sharded gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nucleate.errors import ConfigurationError, NonFiniteGradientError, name_list


@torch.no_grad()
def clip_by_norm(
    parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = True
) -> Tensor:
    """Scale all gradients so that their total norm is at most `max_norm`.

    The result equals that of `torch.nn.utils.clip_grad_norm_`, which fails on gradients of several meshes. Here the
    norm of each group of one mesh and placement is computed separately, and then the norms are combined.

    Args:
        parameters: The parameters whose gradients are clipped.
        max_norm: The largest allowed norm.
        norm_type: The order of the norm; it may be `inf`.
        error_if_nonfinite: Refuse a norm that is NaN or infinite, before any gradient is changed.

    Returns:
        The norm before clipping, equal on every rank.

    Raises:
        ConfigurationError: `max_norm` is negative or NaN.
        NonFiniteGradientError: See `error_if_nonfinite`.
    """
    if not max_norm >= 0:
        raise ConfigurationError(f"max_norm={max_norm!r} must be a number of at least 0.")
    gradients = [p.grad for p in parameters if p.grad is not None]
    groups: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault(_layout(gradient), []).append(gradient)
    totals = [_whole(torch.nn.utils.get_total_norm(group, norm_type)) for group in groups.values()]
    if not totals:
        return torch.tensor(0.0)
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(totals[0].device) for norm in totals]), norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise NonFiniteGradientError(
            f"the total norm of order {norm_type} of the gradients is {total.item()}, so they cannot be clipped. Find "
            "where the loss becomes NaN or infinite, or pass error_if_nonfinite=False to continue with these gradients."
        )
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for gradient in gradients:
        local = _local(gradient)
        local.mul_(scale.to(local.device))
    return total


@torch.no_grad()
def clip_by_value(parameters: Iterable[Tensor], clip_value: float) -> None:
    """Limit every element of every gradient to `[-clip_value, clip_value]`.

    Args:
        parameters: The parameters whose gradients are clipped.
        clip_value: The largest allowed absolute value.

    Raises:
        ConfigurationError: `clip_value` is negative or NaN, or a gradient is complex. No gradient has been changed.
    """
    if not clip_value >= 0:
        raise ConfigurationError(f"clip_val={clip_value!r} must be a number of at least 0.")
    gradients = [p.grad for p in parameters if p.grad is not None]
    complex_shapes = [str(tuple(gradient.shape)) for gradient in gradients if gradient.is_complex()]
    if complex_shapes:
        raise ConfigurationError(
            f"clip_val={clip_value!r} limits real numbers, but the gradients of shapes {name_list(complex_shapes)} are "
            "complex. Clip by the norm instead: max_norm=..."
        )
    for gradient in gradients:
        _local(gradient).clamp_(-clip_value, clip_value)


def _layout(gradient: Tensor) -> Any:
    mesh = getattr(gradient, "device_mesh", None)
    return (gradient.device, gradient.dtype) if mesh is None else (id(mesh), gradient.placements)  # type: ignore[attr-defined]


def _whole(norm: Tensor) -> Tensor:
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def _local(gradient: Tensor) -> Tensor:
    local: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local
