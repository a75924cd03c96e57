"""The handover from a deferred tensor, whose guard is removed, to the value that takes its place.

In between, a strategy shards plain meta tensors. If the strategy fails, a mark distinguishes these tensors from tensors
that the user built on the meta device, which have no value to lose.

torch's means of laying out, such as `fully_shard` and `parallelize_module`, put a new object in the place of each
parameter. `Before` keeps the facts that the new objects do not have.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nucleate.errors import ConfigurationError, name_list
from nucleate.layout import layout_of
from nucleate.shells import named_modules, named_parameters

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


class Before:
    """The facts about a model's parameters that a new object in their place does not have.

    Args:
        model: The model, before it is laid out.
    """

    def __init__(self, model: nn.Module) -> None:
        # The objects themselves are not kept: a real parameter's memory is free as soon as it is replaced.
        named = dict(named_parameters(model, remove_duplicate=False))
        self._hooks = {name: p._post_accumulate_grad_hooks for name, p in named.items()}
        # Attributes that users set, without our own.
        self._attributes = {
            name: {key: value for key, value in vars(p).items() if not key.startswith("_nucleate")}
            for name, p in named.items()
        }
        ties: dict[int, list[str]] = {}
        for name, parameter in named.items():
            ties.setdefault(id(parameter), []).append(name)
        self._ties = [names for names in ties.values() if len(names) > 1]

    def tie_again(self, model: nn.Module) -> None:
        """Tie the names again that stood for one parameter.

        Raises:
            ConfigurationError: The strategy has laid them out differently.
        """
        if not self._ties:
            return
        modules = dict(named_modules(model, remove_duplicate=False))
        for names in self._ties:
            places = [(modules[prefix], key) for prefix, _, key in (name.rpartition(".") for name in names)]
            held = [module._parameters[key] for module, key in places]
            found = [parameter for parameter in held if parameter is not None]
            distinct = {id(parameter): parameter for parameter in found}
            if len(distinct) == 1:
                continue
            if len({_form(parameter) for parameter in distinct.values()}) > 1:
                raise ConfigurationError(
                    f"{name_list(names)} are tied, and the strategy lays them out in different ways: "
                    f"{name_list(dict.fromkeys(_form(parameter) for parameter in found))}. Lay them out alike, or "
                    "untie them in the constructor."
                )
            for module, key in places:
                module._parameters[key] = found[0]

    def restore(self, model: nn.Module) -> None:
        """Give new parameter objects the attributes and hooks of those in whose place they are."""
        if not any(self._attributes.values()) and not any(self._hooks.values()):
            return
        for name, parameter in named_parameters(model, remove_duplicate=False):
            for key, value in self._attributes.get(name, {}).items():
                if key not in vars(parameter):
                    setattr(parameter, key, value)
            hooks = self._hooks.get(name)
            if hooks and parameter._post_accumulate_grad_hooks is not hooks:
                parameter._post_accumulate_grad_hooks = hooks


def _form(parameter: nn.Parameter) -> str:
    found = layout_of(parameter, 1)
    placements = ", ".join(map(str, found.placements)) or "whole"
    return f"{placements} on {found.mesh}"
