"""The reference for tensors without a recipe: memory is taken, and each module's own method is called by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from tests.device import device


def children_first(module: nn.Module, seen: set[int] | None = None) -> Iterator[nn.Module]:
    """Yield modules as `Module.apply` visits them, each once."""
    seen = set() if seen is None else seen
    if id(module) not in seen:
        seen.add(id(module))
        for child in module.children():
            yield from children_first(child, seen)
        yield module


def reset_by_hand(model: nn.Module) -> nn.Module:
    """Call the method of every module that holds a tensor itself."""
    for module in children_first(model):
        if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            names = ("reset_parameters", "init_weights", "_init_weights", "_reset_parameters")
            next(getattr(module, name) for name in names if hasattr(module, name))()
    return model


def made_by_hand(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model on the meta device, and make and fill its memory."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = make()
    ties: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            ties.setdefault(id(parameter), []).append((module, name))
    model.to_empty(device=device())
    for places in ties.values():
        # `to_empty` has untied them.
        for module, name in places:
            setattr(module, name, getattr(*places[0]))
    return reset_by_hand(model)
