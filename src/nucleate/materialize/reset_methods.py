"""The methods by which modules give their tensors values after construction, and the choice of those for a model.

There are two conventions. A method without arguments fills the tensors of its module: `reset_parameters` of torch.nn,
which Fabric calls as well, and `init_weights` and similar ones. A method that takes a module, `_init_weights(module)`,
fills that module by the rules of the model around it, as in transformers, timm and nanoGPT.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

#: Methods without arguments; the first that a module has counts.
OWN_NAMES = ("reset_parameters", "init_weights", "_init_weights", "_reset_parameters")
#: Methods that take a module; the first that a module has counts. Only the first name is called for any module.
POLICY_NAMES = ("_init_weights", "init_weights")

# Names of a parameter for the module. With another name, the parameter needs an annotation.
_MODULE_NAMES = frozenset(("module", "m", "mod", "layer", "submodule"))


@dataclass(frozen=True, slots=True)
class ResetCall:
    """One call of such a method.

    Attributes:
        method: The bound method.
        name: The class of the method's module and the name of the method.
        receiver: The FQN of the method's module.
        args: The module that the method takes, or nothing.
        argument: The FQN of the module in `args`.
    """

    method: Callable[..., Any]
    name: str
    receiver: str
    args: tuple[nn.Module, ...] = ()
    argument: str = ""

    def __str__(self) -> str:
        text = f"{self.name}({self.argument if self.argument or not self.args else 'self'})"
        return f"{text} of {self.receiver}" if self.receiver else text


def reset_calls(model: nn.Module, owners: Iterable[nn.Module]) -> list[tuple[nn.Module, list[ResetCall]]]:
    """Return the calls that fill the tensors of some modules, in the order in which `Module.apply` visits modules.

    A module's own method comes first. The nearest method around it that takes a module comes next. `_init_weights` is
    called for the modules around as well, as by `Module.apply`, because it may fill tensors of their children. If a
    module has neither method, the nearest module around it with a method without arguments fills its tensors.

    Args:
        model: The model.
        owners: The modules that hold a tensor without a value.

    Returns:
        Modules in the order of the visits, each with the calls that its visit makes.
    """
    holding = {id(module) for module in owners}
    names = {id(module): name for name, module in model.named_modules()}
    around = _ancestors(model)
    order = list(_children_first(model, set()))
    concerned = {id(m) for module in order if id(module) in holding for m in (module, *around[id(module)])}
    calls: dict[int, list[ResetCall]] = {id(module): [] for module in order}
    for module in order:
        if id(module) not in concerned:
            continue
        chain = [module, *around[id(module)]]
        own = _own(module, names) if id(module) in holding else None
        wanted = POLICY_NAMES if id(module) in holding else POLICY_NAMES[:1]
        policy = next(filter(None, (_policy(outer, module, wanted, names) for outer in chain)), None)
        calls[id(module)] += [call for call in (own, policy) if call is not None and call not in calls[id(module)]]
        if id(module) in holding and own is None and policy is None:
            outer = next((outer for outer in chain if _own(outer, names) is not None), None)
            call = None if outer is None else _own(outer, names)
            if outer is not None and call is not None and call not in calls[id(outer)]:
                # The visit of this module comes later: children come first.
                calls[id(outer)].insert(0, call)
    return [(module, calls[id(module)]) for module in order if calls[id(module)]]


def _own(module: nn.Module, names: dict[int, str]) -> ResetCall | None:
    """Return the call of a module's method without arguments."""
    for name in OWN_NAMES:
        method = _method(module, name)
        if method is not None and _takes(method) == []:
            return ResetCall(method, f"{type(module).__name__}.{name}", names[id(module)])
    return None


def _policy(owner: nn.Module, module: nn.Module, wanted: Iterable[str], names: dict[int, str]) -> ResetCall | None:
    """Return the call of a method of `owner` that takes `module`."""
    for name in wanted:
        method = _method(owner, name)
        taken = None if method is None else _takes(method)
        if method is not None and taken is not None and len(taken) == 1 and _is_for_module(taken[0]):
            text = f"{type(owner).__name__}.{name}"
            return ResetCall(method, text, names[id(owner)], (module,), names[id(module)])
    return None


def _method(module: nn.Module, name: str) -> Callable[..., Any] | None:
    try:
        method = getattr(module, name, None)
    except Exception:  # From a property or a `__getattr__` of the user.
        return None
    # A scripted method does not run under torch's modes.
    if not callable(method) or isinstance(method, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        return None
    return method  # type: ignore[no-any-return]


def _takes(method: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """Return the parameters without a default, or None if the signature is unknown or requires keywords."""
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return None
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p for p in parameters if p.default is inspect.Parameter.empty and p.kind not in variable]
    return None if any(p.kind is inspect.Parameter.KEYWORD_ONLY for p in needed) else needed


def _is_for_module(parameter: inspect.Parameter) -> bool:
    if parameter.annotation is inspect.Parameter.empty:
        return parameter.name in _MODULE_NAMES
    if parameter.name in _MODULE_NAMES:
        return True
    annotation = parameter.annotation
    is_class = isinstance(annotation, type) and issubclass(annotation, nn.Module)
    return is_class or "Module" in str(annotation)


def _ancestors(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Return the modules around each module, the nearest first, along its first name."""
    around: dict[int, list[nn.Module]] = {}

    def visit(module: nn.Module, outer: list[nn.Module]) -> None:
        if id(module) not in around:
            around[id(module)] = outer
            for child in module.children():
                visit(child, [module, *outer])

    visit(model, [])
    return around


def _children_first(module: nn.Module, seen: set[int]) -> Iterator[nn.Module]:
    if id(module) in seen:
        return
    seen.add(id(module))
    for child in module.children():
        yield from _children_first(child, seen)
    yield module
