"""Objects from a class path and arguments, as configuration files give them."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def instantiate_class(args: Any | tuple[Any, ...], init: dict[str, Any]) -> Any:
    """Make an object of the class that a configuration names.

    Args:
        args: The positional arguments: one, or a tuple.
        init: `class_path` is the dotted name of the class; `init_args` are its keyword arguments.
    """
    module, _, name = init["class_path"].rpartition(".")
    positional = args if isinstance(args, tuple) else (args,)
    return getattr(import_module(module), name)(*positional, **init.get("init_args", {}))
