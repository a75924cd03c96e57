"""Which modules become units of their own: gathered for their forward, freed after it.

A policy is a set of classes, a predicate, or `"auto"`, which finds repeated blocks by itself. Whatever the policy
says, tied parameters stay together: a module that shares a parameter with the rest of the model is left to its
parent's unit, since a parameter can belong to one unit only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

from torch import nn

from nucleate.errors import ConfigurationError, name_list

WrapPolicy = Literal["auto"] | Iterable[type[nn.Module]] | Callable[[str, nn.Module], bool]

# Containers without a forward of their own: nothing would ever gather them.
_WITHOUT_FORWARD = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def find_units(model: nn.Module, policy: WrapPolicy) -> list[tuple[str, nn.Module]]:
    """Return the modules to shard on their own, innermost first, without the root.

    Args:
        model: The model.
        policy: See above; a predicate is called with the module's name and the module.

    Raises:
        ConfigurationError: A class in the policy occurs nowhere in the model.
    """
    if policy == "auto":
        chosen = list(_repeated_blocks(model))
    elif callable(policy):
        chosen = [(name, module) for name, module in model.named_modules() if policy(name, module)]
    else:
        classes = tuple(policy)
        wrong = [item for item in classes if not (isinstance(item, type) and issubclass(item, nn.Module))]
        if wrong:
            raise ConfigurationError(
                f"wrap={policy!r} holds {wrong[0]!r}, which is no module class. Give 'auto', classes of modules, or a "
                "function of a module's name and the module."
            )
        chosen = [(name, module) for name, module in model.named_modules() if isinstance(module, classes)]
        absent = [cls.__name__ for cls in classes if not any(isinstance(m, cls) for m in model.modules())]
        if absent:
            present = name_list(sorted({type(module).__name__ for module in model.modules()}))
            raise ConfigurationError(
                f"wrap names {name_list(absent)}, but {type(model).__name__} has none of them. It has: {present}."
            )
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), set()).add(id(module))
    return [
        (name, module)
        for name, module in reversed(chosen)
        if module is not model and not isinstance(module, _WITHOUT_FORWARD) and not _shares_parameters(module, holders)
    ]


def _repeated_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost blocks that a list or sequence repeats: siblings of one class, with parameters."""
    found: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            continue
        children = [
            (f"{name}.{key}" if name else key, child)
            for key, child in module.named_children()
            if any(True for _ in child.parameters())
        ]
        counts: dict[type[nn.Module], int] = {}
        for _, child in children:
            counts[type(child)] = counts.get(type(child), 0) + 1
        for child_name, child in children:
            if counts[type(child)] > 1:
                found.append(child_name)
                yield child_name, child


def _shares_parameters(unit: nn.Module, holders: Mapping[int, set[int]]) -> bool:
    """Return whether a module outside of `unit` holds one of its parameters, given who holds which."""
    inside = {id(module) for module in unit.modules()}
    return any(not holders[id(parameter)] <= inside for parameter in unit.parameters())
