"""Wrap policies: the choice of modules that become units, which are gathered for their forward and freed after it.

`module_policy.py` says which modules a policy chooses. Some rules hold under every policy:

- A parameter belongs to only one unit. So tied parameters stay together: a module that shares a parameter with the rest
  of the model belongs to its parent's unit. A module that several units hold becomes a unit of its own.
- The parts of a model without a forward are units, because that model's own forward never runs.
- FSDP cannot gather parameters without a dimension, and parameters that belong to no part or to several. They stay
  whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from nucleate.dimensions.module_policy import ModulePolicy, select
from nucleate.dimensions.parts import has_forward, parts_of
from nucleate.shells import named_modules


def find_units(model: nn.Module, policy: ModulePolicy) -> list[tuple[str, nn.Module]]:
    """Return the modules that become units, innermost first, without the root.

    Args:
        model: The model.
        policy: The policy.

    Raises:
        ConfigurationError: See `select`.
    """
    named = list(named_modules(model))
    chosen = select(model, policy, "wrap")
    # A shell has the name of the module inside. The outermost one becomes the unit: the hooks that gather parameters
    # then run outside of compiled code, and once for a forward whose activations are computed twice.
    outermost: dict[str, nn.Module] = {}
    for name, module in named:
        outermost.setdefault(name, module)
    holders = _holders(model)
    parts = {id(part) for _, part in parts_of(model)}
    taken = {
        id(module)
        for name, module in outermost.items()
        # FSDP would never gather a module without a forward.
        if name and name in chosen and has_forward(module) and not _shares_parameters(module, holders)
    } | parts
    _settle(model, taken, parts, holders)
    units = [(name, module) for name, module in reversed(outermost.items()) if id(module) in taken]
    return sorted(units, key=lambda unit: size_of(unit[1]))


def size_of(module: nn.Module) -> int:
    """Return a number that is smaller for a module than for each module that holds it. Shells do not count."""
    return len({name for name, _ in named_modules(module)})


def whole_parameters(model: nn.Module, units: Iterable[tuple[str, nn.Module]]) -> set[nn.Parameter]:
    """Return the parameters that every rank keeps whole.

    Args:
        model: The model.
        units: The units that `find_units` returned.
    """
    whole = {parameter for parameter in model.parameters() if parameter.dim() == 0}
    if not has_forward(model):
        owners = _owners(model, {id(unit) for _, unit in units})
        of: dict[nn.Parameter, set[int]] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                of.setdefault(parameter, set()).update(owners[id(module)])
        whole.update(parameter for parameter, found in of.items() if len(found) > 1 or id(model) in found)
    return whole


def _settle(model: nn.Module, taken: set[int], parts: set[int], holders: Mapping[int, set[int]]) -> None:
    """Change a choice of units so that each parameter belongs to one of them.

    Args:
        model: The model.
        taken: The ids of the chosen modules; changed in place.
        parts: The ids of modules that stay chosen.
        holders: The ids of the modules that hold a parameter, by the parameter's id.
    """
    while True:
        owners = _owners(model, taken)
        contested = [m for m in model.modules() if len(owners[id(m)]) > 1 and any(True for _ in m.parameters())]
        new = next((m for m in contested if has_forward(m) and not _shares_parameters(m, holders)), None)
        if new is not None:
            taken.add(id(new))
            continue
        given_up = {owner for m in contested if m._parameters for owner in owners[id(m)]} & taken - parts
        if not given_up:
            return
        taken -= given_up


def _owners(model: nn.Module, taken: set[int]) -> dict[int, set[int]]:
    """Return the ids of the innermost units around each module, one for each way from the model to the module."""
    owners: dict[int, set[int]] = {}
    ways = [(model, id(model))]
    while ways:
        module, owner = ways.pop()
        owner = id(module) if id(module) in taken else owner
        found = owners.setdefault(id(module), set())
        if owner not in found:
            found.add(owner)
            ways.extend((child, owner) for child in module.children())
    return owners


def _holders(model: nn.Module) -> dict[int, set[int]]:
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), set()).add(id(module))
    return holders


def _shares_parameters(unit: nn.Module, holders: Mapping[int, set[int]]) -> bool:
    """Return whether a module outside of `unit` holds one of its parameters; `holders` has the modules by parameter."""
    own = {id(module) for module in unit.modules()}
    return any(not holders[id(parameter)] <= own for parameter in unit.parameters())
