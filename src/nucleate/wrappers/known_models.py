"""The models that a runtime has set up: their layouts, and the refusal of models that it has not."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

from torch import nn

from nucleate.errors import UsageError
from nucleate.layout import LiveLayout
from nucleate.shells import inside
from nucleate.wrappers.module import ModuleWrapper


def layouts_in(state: Any, models: Container[nn.Module]) -> Iterator[LiveLayout]:
    """Yield the layouts of the models in a state that were set up.

    Args:
        state: A model, or a dict whose values are such states.
        models: The models that were set up, without shells.
    """
    if isinstance(state, dict):
        for value in state.values():
            yield from layouts_in(value, models)
    elif isinstance(state, nn.Module):
        model = inside(state.module if isinstance(state, ModuleWrapper) else state)
        if model in models:
            yield LiveLayout.of(model)


def wrapper_of(module: nn.Module, method: str) -> ModuleWrapper:
    """Return the wrapper of a model that was set up.

    Args:
        module: The model that `setup` returned.
        method: The method that needs it, for the message.

    Raises:
        UsageError: `setup` has not returned this object.
    """
    model = inside(module, ModuleWrapper) if isinstance(module, nn.Module) else module
    if not isinstance(model, ModuleWrapper):
        raise UsageError(
            f"{method} takes the model that `setup` returned, not {type(model).__name__}. Set it up first."
        )
    return model
