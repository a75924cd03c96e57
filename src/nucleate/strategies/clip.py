"""Gradient clipping for any mix of gradients: whole, sharded, partial, sparse and complex ones, of any devices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nucleate.errors import ConfigurationError, NonFiniteGradientError
from nucleate.layout import gathered_from, held_values, reduced_gradient, spread_of

# Norms of these are computed and returned in float32, because their squares overflow or lose digits.
_NARROW = (torch.float16, torch.bfloat16)


def refuse_limits(max_norm: float | None = None, norm_type: float = 2.0, clip_val: float | None = None) -> None:
    """Refuse limits that no gradients can be clipped to, before anything is done to gradients.

    Args:
        max_norm: The largest allowed norm, or None.
        norm_type: The order of the norm.
        clip_val: The largest allowed absolute value, or None.

    Raises:
        ConfigurationError: A limit is negative or NaN, or `norm_type` is NaN.
    """
    if max_norm is not None and not max_norm >= 0:
        raise ConfigurationError(f"max_norm={max_norm!r} must be a number of at least 0.")
    if math.isnan(float(norm_type)):
        raise ConfigurationError(f"norm_type={norm_type!r} must be a number or inf, such as 2.0.")
    if clip_val is not None and not clip_val >= 0:
        raise ConfigurationError(f"clip_val={clip_val!r} must be a number of at least 0.")


@torch.no_grad()
def clip_by_norm(
    parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = True
) -> Tensor:
    """Scale all gradients so that their total norm is at most `max_norm`.

    The result equals that of `torch.nn.utils.clip_grad_norm_` on a model that one process holds whole. A gradient
    counts once, also where several ranks hold it or a parameter is listed twice. A partial gradient is summed over its
    ranks first, and a sparse one is coalesced. A shard without elements does not change the norm.

    Args:
        parameters: The parameters whose gradients are clipped.
        max_norm: The largest allowed norm.
        norm_type: The order of the norm; it may be `inf`.
        error_if_nonfinite: Refuse a norm that is NaN or infinite, before any gradient is changed.

    Returns:
        The norm before clipping, equal on every rank, in float32 or a wider dtype.

    Raises:
        ConfigurationError: `max_norm` is negative or NaN, or `norm_type` is NaN.
        NonFiniteGradientError: See `error_if_nonfinite`.
    """
    refuse_limits(max_norm=max_norm, norm_type=norm_type)
    order = float(norm_type)
    gradients = _gradients(parameters)
    if not gradients:
        return torch.tensor(0.0)
    total = _total_norm(gradients, order)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise NonFiniteGradientError(
            f"the total norm of order {norm_type} of the gradients is {total.item()}, so they cannot be clipped. Find "
            "where the loss becomes NaN or infinite, or pass error_if_nonfinite=False to continue with these gradients."
        )
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.put()
    for device, values in _by_device(gradients).items():
        torch._foreach_mul_(values, scale.to(device))
    return total


@torch.no_grad()
def clip_by_value(parameters: Iterable[Tensor], clip_value: float) -> None:
    """Limit every element of every gradient to `[-clip_value, clip_value]`.

    A partial gradient is summed over its ranks first, and a sparse one is coalesced. The real and the imaginary part of
    a complex element are limited separately, as torch's optimizers treat them.

    Args:
        parameters: The parameters whose gradients are clipped.
        clip_value: The largest allowed absolute value.

    Raises:
        ConfigurationError: `clip_value` is negative or NaN.
    """
    refuse_limits(clip_val=clip_value)
    for gradient in _gradients(parameters):
        gradient.put()
        values = gradient.values
        if values.is_complex():
            # The limits are symmetric, so they hold for the conjugate values in memory as well.
            values = torch.view_as_real(values.conj() if values.is_conj() else values)
        values.clamp_(-clip_value, clip_value)


@dataclass(slots=True)
class _Gradient:
    """A gradient in a form that can be clipped element by element.

    Attributes:
        parameter: The parameter.
        tensor: The parameter's gradient: a new tensor if the gradient was partial or not coalesced.
        values: The elements of `tensor` that this rank holds, in the memory of `tensor`.
        is_new: Whether `tensor` is new.
    """

    parameter: Tensor
    tensor: Tensor
    values: Tensor
    is_new: bool

    def put(self) -> None:
        """Give the parameter the new tensor as its gradient."""
        if self.is_new:
            self.parameter.grad = self.tensor

    @property
    def has_implied_zeros(self) -> bool:
        """Whether a sparse gradient leaves out elements, which are zero."""
        return self.tensor.layout != torch.strided and self.values.numel() < self.tensor.numel()


def _gradients(parameters: Iterable[Tensor]) -> list[_Gradient]:
    """Return the gradients of parameters, each once. No gradient changes yet."""
    found = []
    for parameter in {id(parameter): parameter for parameter in parameters}.values():
        gradient = parameter.grad
        if gradient is None:
            continue
        if type(gradient) is Tensor and gradient.layout is torch.strided:  # Nearly all are, and this is quicker.
            found.append(_Gradient(parameter, gradient, gradient, is_new=False))
            continue
        tensor = reduced_gradient(parameter)
        if tensor.layout == torch.sparse_coo:
            tensor = tensor.coalesce()
        found.append(_Gradient(parameter, tensor, held_values(tensor), is_new=tensor is not gradient))
    return found


def _by_device(gradients: Sequence[_Gradient]) -> dict[torch.device, list[Tensor]]:
    lots: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        lots.setdefault(gradient.values.device, []).append(gradient.values)
    return lots


def _total_norm(gradients: Sequence[_Gradient], order: float) -> Tensor:
    """Return the norm of the norms of all gradients, as torch computes it. Every rank computes the same."""
    lots: dict[Any, list[Tensor]] = {}
    for gradient, norm in zip(gradients, _norms_here(gradients, order), strict=True):
        lots.setdefault(spread_of(gradient.tensor), []).append(norm)
    device = gradients[0].values.device
    norms = [_norms_of_lot(lot, spread, order) for spread, lot in lots.items()]
    together = norms[0] if len(norms) == 1 else torch.cat([norm.to(device) for norm in norms])
    total: Tensor = torch.linalg.vector_norm(together.to(device), order)
    return total


def _norms_of_lot(lot: Sequence[Tensor], spread: tuple[Any, tuple[bool, ...]] | None, order: float) -> Tensor:
    """Return norms of gradients that are spread over ranks alike: one for each gradient, or one for all.

    Args:
        lot: The norm of the part that this rank holds, for each gradient.
        spread: The ranks; see `nucleate.layout.spread_of`.
        order: The order of the norm.
    """
    device = lot[0].device
    norms = torch.stack([norm if norm.device == device else norm.to(device) for norm in lot])
    if spread is None:
        return norms
    if order == 0:
        # torch counts the elements that are not zero in each gradient, and then the gradients with such elements.
        return gathered_from(norms, *spread).sum(0)
    # The norms are gathered and not added up by a collective, where NaN may lose against a number.
    together: Tensor = torch.linalg.vector_norm(norms, order).reshape(1)
    whole: Tensor = torch.linalg.vector_norm(gathered_from(together, *spread), order, dim=0)
    return whole


def _norms_here(gradients: Sequence[_Gradient], order: float) -> list[Tensor]:
    """Return for each gradient the norm of the elements that this rank holds."""
    norms: dict[int, Tensor] = {}
    lots: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for place, gradient in enumerate(gradients):
        values = gradient.values
        if order < 0 and gradient.has_implied_zeros:
            # One zero decides the norm.
            values = torch.cat([values.reshape(-1), values.new_zeros(1)])
        if values.numel():
            lots.setdefault((values.device, values.dtype), []).append((place, values))
        else:
            # The number that changes no other norm that it is combined with.
            dtype = torch.float32 if values.dtype in _NARROW else values.dtype.to_real()
            norms[place] = torch.full((), math.inf if order < 0 else 0.0, dtype=dtype, device=values.device)
    for (_, dtype), lot in lots.items():
        wide = torch.float32 if dtype in _NARROW else None
        of_lot = torch._foreach_norm([values for _, values in lot], order, dtype=wide)
        norms.update(zip((place for place, _ in lot), of_lot, strict=True))
    return [norms[place] for place in range(len(gradients))]
