"""The choice of layers that a precision freezes: it never takes a layer that trains beside frozen ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from nucleate.errors import name_list

L = TypeVar("L", bound=nn.Module)


def layers_to_freeze(
    layers: Iterable[tuple[str, L]], *, has_frozen: bool = False, precision: str = "", advice: str = ""
) -> list[tuple[str, L]]:
    """Return the layers that a precision may convert, if the converted weights are frozen.

    Whoever freezes some layers wants to train the others, such as adapters beside a frozen model. So if any layer is
    frozen, only frozen layers are returned. If no layer is frozen, the user has not chosen, and all layers are
    returned. A layer is frozen if its `weight` does not require gradients. Its bias may train.

    Args:
        layers: The layers that the precision can convert, by FQN. Each has a parameter `weight`.
        has_frozen: Whether the model has frozen layers besides, such as layers that are converted already.
        precision: The precision's name. Rank 0 then warns if the precision freezes layers that nobody froze.
        advice: A sentence at the end of that warning, about the precision's own options.

    Example:
        >>> base, adapter = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)
        >>> for fqn, _ in layers_to_freeze([("base", base), ("adapter", adapter)]):
        ...     print(fqn)
        base
    """
    found = list(layers)
    frozen = [(fqn, layer) for fqn, layer in found if not _weight(layer).requires_grad]
    if frozen or has_frozen:
        return frozen
    if found and precision and _is_first_rank():
        layers_found = "1 layer" if len(found) == 1 else f"{len(found)} layers"
        warnings.warn(
            f"precision {precision!r} converts the weights of {layers_found} and freezes them, because no layer was "
            f"frozen before: {name_list((fqn or 'the model' for fqn, _ in found), 3)}. To train some of them, freeze "
            "the others before `setup` (`requires_grad_(False)`). To train none, freeze the whole model, which also "
            f"ends this warning. {advice}".rstrip(),
            stacklevel=2,
        )
    return found


def _weight(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.weight
    return weight


def _is_first_rank() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
