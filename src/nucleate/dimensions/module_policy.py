"""Module policies: the modules of a model that a user means by classes, by a function, or by `"auto"`.

`wrap_policy.py` makes units of `fully_shard` of them, and `activation_checkpointing.py` computes their activations
twice. `"auto"` takes the declared modules (`declare_units`), and finds repeated blocks elsewhere by itself. The
policies of torch.distributed.fsdp.wrap choose the modules that they choose for FSDP1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from torch import nn

from nucleate.errors import ConfigurationError, name_list
from nucleate.shells import inside, named_modules

#: The function gets a module's name and the module; a policy of torch gets torch's own arguments.
ModulePolicy = Literal["auto"] | type[nn.Module] | Iterable[type[nn.Module]] | Callable[..., Any]

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


def check_policy(policy: ModulePolicy, option: str) -> None:
    """Refuse a value that cannot be a policy for any model.

    Args:
        policy: The policy.
        option: The name of the argument, for the message.

    Raises:
        ConfigurationError: The value is a text other than `"auto"`, or neither a class, a function nor a list of these.
    """
    if isinstance(policy, str) and policy == "auto":
        return
    if isinstance(policy, str) or not (callable(policy) or isinstance(policy, Iterable) or _runs(policy)):
        raise ConfigurationError(
            f"{option}={policy!r} is not a policy. Give 'auto', classes of modules, or a function of a module's name "
            "and the module."
        )


def select(model: nn.Module, policy: ModulePolicy, option: str) -> set[str]:
    """Return the plain names of the modules that a policy chooses. The root may be one of them.

    Args:
        model: The model.
        policy: The policy; a predicate is called with the module's name and the module.
        option: The name of the argument, for messages.

    Raises:
        ConfigurationError: The policy contains something other than a module class, or a class that the model lacks.
    """
    check_policy(policy, option)
    if isinstance(policy, str):
        return _declared_or_repeated(model)
    classes = getattr(policy, "_module_classes", None)  # ModuleWrapPolicy (torch/distributed/fsdp/wrap.py, 2.13)
    if isinstance(policy, type):
        classes = (policy,)
    if classes is None and _runs(policy):
        return _run(model, policy, option)
    if classes is None and callable(policy):
        if _asks_to_recurse(policy):
            return _recurse(model, policy)
        return {name for name, module in named_modules(model) if policy(name, module)}
    return _of_classes(model, tuple(policy if classes is None else classes), policy, option)  # type: ignore[arg-type]


def _of_classes(model: nn.Module, classes: tuple[Any, ...], policy: object, option: str) -> set[str]:
    wrong = [item for item in classes if not (isinstance(item, type) and issubclass(item, nn.Module))]
    if wrong:
        raise ConfigurationError(
            f"{option}={policy!r} holds {wrong[0]!r}, which is not a module class. Give 'auto', classes of modules, or "
            "a function of a module's name and the module."
        )
    absent = [cls.__name__ for cls in classes if not any(isinstance(m, cls) for m in model.modules())]
    if absent:
        present = name_list(sorted({type(module).__name__ for module in model.modules()}))
        raise ConfigurationError(
            f"{option} names {name_list(absent)}, but {type(model).__name__} has none of them. It has: {present}."
        )
    return {name for name, module in named_modules(model) if isinstance(module, classes)}


# -- policies of torch -------------------------------------------------------------------------------------


def _runs(policy: object) -> bool:
    """Return whether a policy is an object of torch that looks at the whole model, such as a `CustomPolicy`."""
    return hasattr(policy, "_run_policy")


def _run(model: nn.Module, policy: Any, option: str) -> set[str]:
    """Return the modules that such an object chooses."""
    names = {id(module): name for name, module in reversed(list(named_modules(model)))}
    chosen = policy._run_policy(inside(model), set(), {})
    for module, arguments in chosen.items():
        if arguments:
            raise ConfigurationError(
                f"{option}: the policy gives the module {names[id(module)]!r} arguments of its own "
                f"({name_list(arguments)}), which are arguments of FSDP1. Return True instead, and give the strategy "
                "the arguments for all modules."
            )
    return {names[id(module)] for module in chosen}


def _asks_to_recurse(policy: Callable[..., Any]) -> bool:
    """Return whether a function has the arguments of FSDP1's policies: `module`, `recurse` and `nonwrapped_numel`."""
    try:
        return "recurse" in inspect.signature(policy).parameters
    except (TypeError, ValueError):
        return False


def _recurse(model: nn.Module, policy: Callable[..., Any]) -> set[str]:
    """Return the modules that a function with the arguments of FSDP1's policies chooses.

    It is asked whether to look into a module, and, after the module's children, whether to choose the module for the
    parameters that no chosen child has (`_recursive_wrap` in torch/distributed/fsdp/wrap.py, 2.13).
    """
    chosen: set[str] = set()

    def visit(module: nn.Module, name: str) -> int:
        module = inside(module)
        numel = sum(parameter.numel() for parameter in module.parameters())
        if not policy(module=module, recurse=True, nonwrapped_numel=numel):
            return 0
        taken = sum(visit(child, f"{name}.{key}" if name else key) for key, child in module.named_children())
        if name and policy(module=module, recurse=False, nonwrapped_numel=numel - taken):
            chosen.add(name)
            return numel
        return taken

    visit(model, "")
    return chosen


# -- blocks ------------------------------------------------------------------------------------------------


def _declared_or_repeated(model: nn.Module) -> set[str]:
    """Return the names of declared modules, and of the repeated blocks that neither contain nor are in one."""
    declared = {name for name, module in named_modules(model) if _DECLARED in module.__dict__}
    return {*declared, *(name for name, _ in _repeated_blocks(model, declared))}


def _repeated_blocks(model: nn.Module, declared: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost blocks that a container repeats: siblings of one class, with parameters.

    Args:
        model: The model.
        declared: Names of declared units. A module inside of a unit, or around one, is not a block.
    """
    found = list(declared)
    around = {".".join(parts[:end]) for parts in (name.split(".") for name in declared) for end in range(len(parts))}
    for name, module in named_modules(model):
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
            counts[type(inside(child))] = counts.get(type(inside(child)), 0) + 1
        for child_name, child in children:
            if counts[type(inside(child))] > 1 and child_name not in declared and child_name not in around:
                found.append(child_name)
                yield child_name, child
