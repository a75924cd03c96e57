"""Special methods of a model's class, such as `__len__`: Python looks them up on the class of an object.

A wrapper therefore needs a class that has the special methods of its model's class, and no others: an object with
`__len__` is false when it is empty. This file finds these methods, and makes such classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")

# Methods of the wrapper itself: its life, its attributes, its copies and its call.
_OWN = frozenset(
    f"__{name}__"
    for name in (
        *("new", "init", "del", "call", "repr", "dir", "sizeof", "init_subclass", "class_getitem", "subclasshook"),
        *("getattr", "getattribute", "setattr", "delattr", "annotate", "annotate_func"),
        *("reduce", "reduce_ex", "getstate", "setstate", "getnewargs", "getnewargs_ex", "copy", "deepcopy", "replace"),
    )
)
_BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow", "lshift", "rshift")
#: Operators of two objects, which may both be wrapped.
OPERATORS = frozenset(
    (
        *(f"__{name}__" for name in ("lt", "le", "eq", "ne", "gt", "ge")),
        *(f"__{kind}{name}__" for name in (*_BINARY, "and", "or", "xor") for kind in ("", "r", "i")),
    )
)

#: Names of special methods, each with whether the class has the method; a class without it has None there.
Methods = tuple[tuple[str, bool], ...]


def special_methods(cls: type[nn.Module]) -> Methods:
    """Return the special methods that a class of modules has and `nn.Module` does not have."""
    found: dict[str, bool] = {}
    for base in cls.__mro__:
        if base in nn.Module.__mro__:
            continue
        for name, value in vars(base).items():
            is_special = name.startswith("__") and name.endswith("__") and name not in _OWN
            if is_special and not isinstance(value, type) and _is_method(value):
                found.setdefault(name, value is not None)
    return tuple(sorted(found.items()))


def _is_method(value: Any) -> bool:
    # None stands for a method that the class does not want to have. An example is the `__hash__` of a class with an
    # `__eq__` only.
    return value is None or callable(value) or isinstance(value, (classmethod, staticmethod))


@functools.cache
def class_with(base: type[T], methods: Methods) -> type[T]:
    """Return a subclass with special methods that call `base._call_special`, or `base` if there are no methods.

    Args:
        base: The class of wrappers.
        methods: The special methods.
    """
    if not methods:
        return base
    namespace: dict[str, Any] = {name: _calling(name) if has else None for name, has in methods}
    namespace.update(__module__=base.__module__, __doc__=base.__doc__)
    made: type[T] = type(base.__name__, (base,), namespace)
    return made


def _calling(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._call_special(name, args, kwargs)

    method.__name__, method.__qualname__ = name, f"ModuleWrapper.{name}"
    return method


def bound(model: nn.Module, name: str) -> Callable[..., Any]:
    """Return a special method of a model, found as Python finds it: on the class, past the attributes of the model."""
    cls = type(model)
    for base in cls.__mro__:
        if name in vars(base):
            value = vars(base)[name]
            method: Callable[..., Any] = value.__get__(model, cls) if hasattr(type(value), "__get__") else value
            return method
    raise AttributeError(f"{cls.__name__} has no method {name}")
