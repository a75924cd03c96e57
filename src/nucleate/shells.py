"""Shells: modules of other libraries that wrap one module and show in its names, such as that of `torch.compile`.

This file decides which classes are shells, and the names that a model has without them: those of the plain model. All
names that users see go through these functions: keys of checkpoints, FQNs in messages, the names of a model that is set
up. Another library adds its class by `declare_shell`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")

# The attribute with the wrapped module, by the name of the class: importing some of these classes takes seconds.
_KNOWN = {
    # Our own wrapper of a model, whose tree is the model's: it never shows in names.
    "nucleate.wrappers.delegation.Delegating": "module",
    # torch 2.13: torch/_dynamo/eval_frame.py
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    # Checkpointing and offloading of activations.
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
}

# The same for the classes of others.
_declared: weakref.WeakKeyDictionary[type[nn.Module], str] = weakref.WeakKeyDictionary()
# What `attribute_of` has found, for each class that it was asked about.
_found: weakref.WeakKeyDictionary[type[nn.Module], str | None] = weakref.WeakKeyDictionary()


def declare_shell(cls: type[nn.Module], attribute: str) -> None:
    """Declare that modules of a class are shells: they wrap one module, and names leave them out.

    The keys of checkpoints, the names of parameters and the messages are then those of the model without the shell.

    Args:
        cls: The class. It has no parameters and buffers of its own.
        attribute: The attribute that holds the wrapped module.
    """
    _declared[cls] = attribute
    _found.clear()


def attributes() -> set[str]:
    """Return the attributes that hold the wrapped module in any class of shells."""
    return {*_KNOWN.values(), *_declared.values()}


def attribute_of(cls: type[nn.Module]) -> str | None:
    """Return the attribute that holds the wrapped module, or None if a class is not one of shells."""
    try:
        return _found[cls]
    except KeyError:
        names = (_declared.get(base) or _KNOWN.get(f"{base.__module__}.{base.__qualname__}") for base in cls.__mro__)
        _found[cls] = attribute = next((name for name in names if name is not None), None)
        return attribute


def content(module: nn.Module) -> nn.Module | None:
    """Return the module inside of a shell, or None if `module` is not a shell."""
    attribute = attribute_of(type(module))
    if attribute is None:
        return None
    if isinstance(getattr(type(module), attribute, None), property):
        held = getattr(module, attribute)
    else:
        # Without `getattr`, which some shells pass on to a module that they do not have yet.
        held = module.__dict__.get("_modules", {}).get(attribute)
    return held if isinstance(held, nn.Module) else None


def inside(module: nn.Module, until: type | tuple[type, ...] = ()) -> nn.Module:
    """Return the module inside of all shells around it.

    Args:
        module: A module, with or without shells.
        until: Classes of shells that are returned themselves.
    """
    while not isinstance(module, until):
        held = content(module)
        if held is None:
            break
        module = held
    return module


def has_shells(root: nn.Module) -> bool:
    """Return whether a module or one of its submodules is a shell that shows in names."""
    known: dict[type, bool] = {}
    for module in root.modules():
        cls = type(module)
        if cls not in known:
            known[cls] = attribute_of(cls) is not None
        if known[cls]:
            return True
    return False


def plain_name(root: nn.Module, name: str) -> str:
    """Return the name of a module or tensor without the shells around it.

    Args:
        root: The module that the name begins at.
        name: A name as torch gives it, or a plain one.
    """
    return ".".join(part for part, is_shell in _steps(root, name) if not is_shell)


def full_name(root: nn.Module, name: str) -> str:
    """Return the name that torch's own functions find a tensor or module by: the inverse of `plain_name`.

    A module's plain name leads to the outermost shell around it.

    Args:
        root: The module that the name begins at.
        name: A plain name, or one as torch gives it.
    """
    return ".".join(part for part, _ in _steps(root, name))


def _steps(root: nn.Module, name: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of the full name, each with whether a shell makes it."""
    module: nn.Module | None = root
    parts = name.split(".") if name else []
    while parts:
        held = None if module is None else content(module)
        if module is not None and held is not None:
            attribute = attribute_of(type(module))
            # Some shells leave themselves out of the keys of a state dict, so the name may lack their part.
            if attribute is not None and module._modules.get(attribute) is held:
                yield attribute, True
                if parts[0] == attribute:
                    parts.pop(0)
            module = held
            continue
        part = parts.pop(0)
        yield part, False
        module = None if module is None else module._modules.get(part)


def plain_names(root: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the plain name of each name. Two names that would become one stay as they are.

    Args:
        root: The module that the names begin at.
        names: Names as torch gives them.
    """
    found = {name: plain_name(root, name) for name in names}
    counts = Counter(found.values())
    return {name: plain if counts[plain] == 1 else name for name, plain in found.items()}


def plain_items(root: nn.Module, found: Iterable[tuple[str, T]], prefix: str = "") -> Iterator[tuple[str, T]]:
    """Yield named modules or tensors under their plain names.

    Args:
        root: The module that the names begin at.
        found: Pairs of a name and a thing, such as those of `root.named_parameters(prefix)`.
        prefix: The text before all names, without the dot that follows.
    """
    # A name without such a part is plain. To look into all names is quicker than to look for shells.
    parts_of_shells, begin = attributes(), f"{prefix}." if prefix else ""
    for name, thing in found:
        if not parts_of_shells.isdisjoint(name.split(".")) and name != prefix and name.startswith(begin):
            plain = plain_name(root, name[len(begin) :])
            name = f"{begin}{plain}" if plain else prefix
        yield name, thing


def named_modules(root: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules inside of the shells around `root`, under plain names.

    A shell in the tree has the name of the module inside, and comes before it.
    """
    root = inside(root)
    return plain_items(root, root.named_modules(remove_duplicate=remove_duplicate))


def named_parameters(root: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a module under plain names."""
    root = inside(root)
    return plain_items(root, root.named_parameters(remove_duplicate=remove_duplicate))


def named_buffers(root: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers of a module under plain names."""
    root = inside(root)
    return plain_items(root, root.named_buffers(remove_duplicate=remove_duplicate))


def state_dict(root: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return the state dict of a module with plain keys, also in the versions of modules that torch keeps beside it.

    Args:
        root: The module.
        args: Arguments of its `state_dict`: `destination`, `prefix` and `keep_vars`.
        kwargs: The same by name.
    """
    root = inside(root)
    found = root.state_dict(*args, **kwargs)
    if isinstance(found, MutableMapping) and has_shells(root):
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        _rename(found, root, prefix)
        versions = getattr(found, "_metadata", None)
        if isinstance(versions, MutableMapping):
            _rename_modules(versions, root, prefix)
    return found


def _rename(entries: MutableMapping[str, Any], root: nn.Module, prefix: str) -> None:
    """Give the entries under a prefix plain keys, in the same order."""
    items = list(entries.items())
    names = plain_names(root, [key[len(prefix) :] for key, _ in items if key.startswith(prefix)])
    entries.clear()
    for key, value in items:
        entries[f"{prefix}{names[key[len(prefix) :]]}" if key.startswith(prefix) else key] = value


def _rename_modules(versions: MutableMapping[str, Any], root: nn.Module, prefix: str) -> None:
    """Give the versions of modules under a prefix plain names. The version of the module inside of a shell counts."""
    top = prefix.removesuffix(".")
    for name in [name for name in versions if name == top or name.startswith(prefix)]:
        value = versions.pop(name)
        plain = plain_name(root, name[len(prefix) :])
        versions[f"{prefix}{plain}" if plain else top] = value


@contextmanager
def without_shells(root: nn.Module) -> Iterator[nn.Module]:
    """Take the shells out of a tree while the block runs, so that all its code sees the plain model.

    The block may put another module into the place of one that is inside a shell. The shell then wraps the new one.

    Args:
        root: The module, which may be a shell itself.

    Yields:
        The module inside of the shells around `root`.
    """
    plain = inside(root)
    places: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
    try:
        waiting, seen = [plain], {id(plain)}
        while waiting:
            parent = waiting.pop()
            for name, child in list(parent._modules.items()):
                if child is None:
                    continue
                held = inside(child)
                if held is not child:
                    places.append((parent, name, child, held))
                    parent._modules[name] = held
                if id(held) not in seen:
                    seen.add(id(held))
                    waiting.append(held)
        yield plain
    finally:
        for parent, name, shell, held in places:
            now = parent._modules.get(name)
            if now is not None:
                parent._modules[name] = refilled(shell, held, now)


def apply_inside(root: nn.Module, function: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Call a function with the plain model, and return `root` with the function's result in its place.

    Args:
        root: The module, with or without shells.
        function: Gets the plain model. It may replace parts of the model, and returns the model or another module.
    """
    with without_shells(root) as plain:
        made = function(plain)
    return refilled(root, plain, made)


def refilled(shell: nn.Module, before: nn.Module, now: nn.Module) -> nn.Module:
    """Return a shell whose innermost module is replaced, or the new module if there is no shell around the former one.

    Args:
        shell: The outermost shell.
        before: The module that was inside of all shells.
        now: The module that takes its place.
    """
    if now is before:
        return shell
    holder = shell
    while (held := content(holder)) is not None:
        if held is now:  # The same shell stands in two places.
            return shell
        if held is before:
            attribute = attribute_of(type(holder))
            assert attribute is not None
            setattr(holder, attribute, now)
            if is_compiled(holder):
                # torch binds `forward` to the module once, in `OptimizedModule._initialize` (torch 2.13).
                holder._initialize()  # type: ignore[operator]
            return shell
        holder = held
    return now


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is one that `torch.compile` returned."""
    return any(
        f"{base.__module__}.{base.__qualname__}" == "torch._dynamo.eval_frame.OptimizedModule"
        for base in type(module).__mro__
    )


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` was called with, or the module itself."""
    held = content(module) if is_compiled(module) else None
    return module if held is None else held
