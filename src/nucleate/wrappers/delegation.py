"""A module that shows as another module: the same tree, the same tensors and the names and keys of the plain model.

`nucleate.shells` knows these names. The class here decides which methods of `nn.Module` go to the other module, and
which of them get their names from there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from nucleate.devices.kinds import module_moves
from nucleate.shells import (
    full_name,
    has_shells,
    inside,
    plain_items,
    plain_names,
    state_dict,
    without_shells,
)


class Delegating(nn.Module):
    """The base of a wrapper: what `nn.Module` asks of a tree is answered by the module that it wraps."""

    @property
    def module(self) -> nn.Module:
        """The user's model."""
        original: nn.Module = self.__dict__["_original"]
        return original

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's state dict, with the keys of the plain model."""
        return state_dict(self.module, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict with the keys of the plain model into the model.

        Values are copied also with `assign=True`. Assigned parameters would be others than those that optimizers and
        strategies know, so no step would train them.

        Args:
            state_dict: Tensors by key.
            strict: Refuse missing and unexpected keys.
            assign: Accepted, without an effect.
        """
        with without_shells(self.module) as plain:
            return plain.load_state_dict(state_dict, strict)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        # A parent loads its children by this method, and torch then looks for the keys that shells have.
        if has_shells(self.module):
            keys = plain_names(self.module, self.module.state_dict(keep_vars=True))
            for key, plain in keys.items():
                if key != plain and f"{prefix}{plain}" in state:
                    state[f"{prefix}{key}"] = state.pop(f"{prefix}{plain}")
        self.module._load_from_state_dict(state, prefix, *args)


def _delegate(name: str) -> Callable[..., Any]:
    @functools.wraps(getattr(nn.Module, name))
    def method(self: Delegating, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.module, name)(*args, **kwargs)
        return self if result is self.module else result

    return method


def _delegate_named(name: str, prefix_place: int) -> Callable[..., Any]:
    """Return a method that yields plain names; its argument at `prefix_place` is a prefix."""

    @functools.wraps(getattr(nn.Module, name))
    def method(self: Delegating, *args: Any, **kwargs: Any) -> Any:
        model = inside(self.module)
        prefix = kwargs.get("prefix", args[prefix_place] if len(args) > prefix_place else "")
        return plain_items(model, getattr(model, name)(*args, **kwargs), prefix)

    return method


def _delegate_target(name: str) -> Callable[..., Any]:
    """Return a method that finds a module or tensor by its name, also by its plain name."""

    @functools.wraps(getattr(nn.Module, name))
    def method(self: Delegating, target: str, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.module, name)(full_name(self.module, target), *args, **kwargs)
        return self if result is self.module else result

    return method


# The model may have its own version of any of these methods. `modules` and the like must also yield the model itself
# as the root, not the wrapper.
for _name in (
    *("parameters", "buffers", "modules", "children", "register_parameter", "register_buffer", "register_module"),
    *("add_module", "train", "eval", "requires_grad_", "zero_grad", "apply", "share_memory"),
    # Moves that another package adds later for a kind of device all call `_apply`.
    *("to", "to_empty", "type", *module_moves(), "float", "double", "half", "bfloat16", "_apply"),
):
    setattr(Delegating, _name, _delegate(_name))
for _name, _place in (("named_parameters", 0), ("named_buffers", 0), ("named_modules", 1), ("named_children", 0)):
    setattr(Delegating, _name, _delegate_named(_name, _place))
for _name in ("get_parameter", "get_buffer", "get_submodule", "set_submodule"):
    setattr(Delegating, _name, _delegate_target(_name))
