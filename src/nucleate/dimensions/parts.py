"""Parts: the modules that users call in a model without a forward of its own, such as a `ModuleDict` of two models.

A strategy acts around forward. A model without a forward is never called, so its strategy acts around its parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from torch import nn

from nucleate.shells import inside


def absent_forward(self: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
    """Stand for the forward of a module that has none, where torch insists on one; see `sharded_class.py`.

    Raises:
        NotImplementedError: Always, in the words of torch.
    """
    raise NotImplementedError(f'Module [{type(self).__name__}] is missing the required "forward" function')


def has_forward(module: nn.Module) -> bool:
    """Return whether a module, inside of its shells, can be called. Containers such as `ModuleList` cannot."""
    module = inside(module)
    return "forward" in vars(module) or type(module).forward not in (nn.Module.forward, absent_forward)


def parts_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the outermost modules with a forward, by FQN, of a model without one.

    Args:
        model: The model. With a forward it has no parts: users call the model itself.
    """
    return [] if has_forward(model) else list({id(part): (name, part) for name, part in _parts_below(model)}.values())


def _parts_below(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for key, child in inside(module).named_children():
        if has_forward(child):
            yield f"{prefix}{key}", child
        else:
            yield from _parts_below(child, f"{prefix}{key}.")
