"""Wrap policies: the choice of modules that become units, which are gathered for their forward and freed after it.

A policy is a set of classes, a predicate, or `"auto"`. `"auto"` takes the declared modules (`declare_units`), and finds
repeated blocks elsewhere by itself. Under every policy, tied parameters stay together: a module that shares a parameter
with the rest of the model belongs to its parent's unit, because a parameter can belong to only one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

from torch import nn

from nucleate.errors import ConfigurationError, name_list

WrapPolicy = Literal["auto"] | Iterable[type[nn.Module]] | Callable[[str, nn.Module], bool]

# Containers without a forward of their own, so FSDP would never gather them.
_WITHOUT_FORWARD = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


# An attribute of the module itself, so that copies of a model have it too.
_DECLARED = "_nucleate_unit"


def declare_units(modules: Iterable[nn.Module]) -> None:
    """Declare modules as units, for `wrap="auto"`.

    Args:
        modules: Modules whose forward is called from outside. Modules without parameters are skipped.
    """
    for module in modules:
        if any(True for _ in module.parameters()):
            module.__dict__[_DECLARED] = True


def find_units(model: nn.Module, policy: WrapPolicy) -> list[tuple[str, nn.Module]]:
    """Return the modules that become units, innermost first, without the root.

    Args:
        model: The model.
        policy: The policy; a predicate is called with the module's name and the module.

    Raises:
        ConfigurationError: The policy contains something other than a module class, or a class that the model lacks.
    """
    if policy == "auto":
        chosen = list(_declared_or_repeated(model))
    elif callable(policy):
        chosen = [(name, module) for name, module in model.named_modules() if policy(name, module)]
    else:
        classes = tuple(policy)
        wrong = [item for item in classes if not (isinstance(item, type) and issubclass(item, nn.Module))]
        if wrong:
            raise ConfigurationError(
                f"wrap={policy!r} holds {wrong[0]!r}, which is not a module class. Give 'auto', classes of modules, or "
                "a function of a module's name and the module."
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


def _declared_or_repeated(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the declared modules, and the repeated blocks that neither contain nor are in one, outermost first."""
    declared = {name for name, module in model.named_modules() if _DECLARED in module.__dict__}
    repeated = {name for name, _ in _repeated_blocks(model, declared)}
    return [(name, module) for name, module in model.named_modules() if name in declared or name in repeated]


def _repeated_blocks(model: nn.Module, declared: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost blocks that a container repeats: siblings of one class, with parameters.

    Args:
        model: The model.
        declared: Names of declared units. A module inside of a unit, or around one, is not a block.
    """
    found = list(declared)
    around = {".".join(parts[:end]) for parts in (name.split(".") for name in declared) for end in range(len(parts))}
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
            if counts[type(child)] > 1 and child_name not in declared and child_name not in around:
                found.append(child_name)
                yield child_name, child


def _shares_parameters(unit: nn.Module, holders: Mapping[int, set[int]]) -> bool:
    """Return whether a module outside of `unit` holds one of its parameters; `holders` has the modules by parameter."""
    inside = {id(module) for module in unit.modules()}
    return any(not holders[id(parameter)] <= inside for parameter in unit.parameters())
