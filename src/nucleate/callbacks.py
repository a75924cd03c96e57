"""Callbacks: objects whose methods a script, or the runtime itself, calls by name.

A callback is any object. The runtime calls two methods by itself: `on_after_setup(runtime, module)` after `setup`, and
`on_after_optimizer_step(strategy, optimizer)` after each step of an optimizer. A name stands for the callbacks that an
installed package offers in the entry point group `nucleate.callbacks`. Nothing of a package runs that nobody named.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

from nucleate.errors import ConfigurationError, PluginLoadError, UsageError
from nucleate.registry import CALLBACKS


class Callbacks:
    """The callbacks of one `Runtime`.

    Args:
        callbacks: The callbacks, in the order in which they are called.
    """

    def __init__(self, callbacks: Iterable[Any] = ()) -> None:
        self._callbacks = list(callbacks)

    @classmethod
    def of(cls, given: object) -> Self:
        """Return the callbacks that the argument of `Runtime` stands for.

        Args:
            given: None, one callback or name, or a list, tuple or set of them.

        Raises:
            ConfigurationError: A callback is a class or None, or it is given twice.
            PluginNotFoundError: No installed package offers a callback of that name.
            PluginLoadError: The offered callback cannot be imported or made.
        """
        listed = list(given) if isinstance(given, (list, tuple, set, frozenset)) else [] if given is None else [given]
        found: list[Any] = []
        for item in listed:
            if item is None or isinstance(item, type):
                raise ConfigurationError(
                    f"callbacks has {item!r}, which is not a callback. Give objects"
                    + (f", such as {item.__name__}()." if isinstance(item, type) else ".")
                )
            found += _installed(item) if isinstance(item, str) else [item]
        if len({id(item) for item in found}) < len(found):
            raise ConfigurationError("callbacks has the same object twice; its methods would be called twice.")
        return cls(found)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._callbacks)

    def call(self, hook_name: str, /, *args: Any, **kwargs: Any) -> None:
        """Call a method of every callback that has it, in their order; see `Runtime.call`.

        Args:
            hook_name: The name of the method.
            args: Its positional arguments.
            kwargs: Its keyword arguments. A method does not get those that it does not name.

        Raises:
            UsageError: A callback has the name, but it is not a method. No method has been called.
        """
        methods: list[Callable[..., Any]] = []
        for callback in self._callbacks:
            method = getattr(callback, hook_name, None)
            if method is None:
                continue
            if not callable(method):
                raise UsageError(
                    f"call({hook_name!r}): {type(callback).__name__}.{hook_name} is {method!r}, which is not a method. "
                    "Give it another name, or make it a method."
                )
            methods.append(method)
        for method in methods:
            method(*args, **_accepted(method, kwargs))


def _installed(name: str) -> list[Any]:
    """Return the callbacks that an installed package offers under a name."""
    make, offer = CALLBACKS.load(name)
    try:
        made = make()
    except Exception as error:
        raise PluginLoadError(
            f"callback {name!r} from {offer} cannot be made: {type(error).__name__}: {error}"
        ) from error
    return list(made) if isinstance(made, (list, tuple)) else [made]


def _accepted(method: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments that a method names, or all of them if it takes any or does not show its own."""
    try:
        parameters = inspect.signature(method).parameters
    except (TypeError, ValueError):
        return kwargs
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return kwargs
    return {name: value for name, value in kwargs.items() if name in parameters}
