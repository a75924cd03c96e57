"""Plain forms: a few classes that configurations often hold, written as plain data and made again by a load.

Every file of `save` must be read with `torch.load(weights_only=True)`, which makes no objects. So an object is written
as a dict that names its class beside its content. `load` makes the object again, of these classes only.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor

#: The key that says which object a dict stands for.
CLASS = "nucleate.class"
_ITEMS = "items"
_MAX_DEPTH = 200
# Booleans, numbers, strings and dates of NumPy.
_KINDS = "biufcSUmM"

_PATHS: dict[type, str] = {
    pathlib.PurePosixPath: "pathlib.PurePosixPath",
    pathlib.PosixPath: "pathlib.PosixPath",
    pathlib.PureWindowsPath: "pathlib.PureWindowsPath",
    pathlib.WindowsPath: "pathlib.WindowsPath",
}


def to_plain(value: Any, escapes: bool = True, depth: int = 0) -> Any:
    """Return a nested value with plain forms in place of namespaces, paths and NumPy's numbers.

    Tensors, and objects of other classes, stay as they are. So does a part that is nested too deep.

    Args:
        value: The nested value.
        escapes: Mark a dict that looks like a plain form, so that it stays a dict. False if `value` comes from a
            checkpoint, where such a dict is a plain form.
        depth: The depth of `value` in the whole.
    """
    kind = type(value)
    if isinstance(value, Tensor) or depth > _MAX_DEPTH:
        return value
    if kind in (dict, OrderedDict):
        plain = kind((key, to_plain(item, escapes, depth + 1)) for key, item in value.items())
        # A dict that has our key must not become an object when it is loaded.
        return {CLASS: "dict", _ITEMS: plain} if escapes and CLASS in value else plain
    if kind in (list, tuple):
        return kind(to_plain(item, escapes, depth + 1) for item in value)
    if kind is argparse.Namespace:
        return {CLASS: "argparse.Namespace", _ITEMS: to_plain(vars(value), escapes, depth + 1)}
    if kind in _PATHS:
        return {CLASS: _PATHS[kind], "path": str(value)}
    if kind.__module__ == "numpy" and "numpy" in sys.modules:
        return _plain_number(value)
    return value


def _plain_number(value: Any) -> Any:
    import numpy

    if not isinstance(value, numpy.generic) or value.dtype.kind not in _KINDS:
        return value
    # Dates have a unit, which is a part of the name of the dtype; a long double has no Python number.
    number = int(value.view("i8")) if value.dtype.kind in "mM" else value.item()
    if isinstance(number, numpy.generic):
        return value
    return {CLASS: "numpy", "dtype": value.dtype.str, "value": number}


def from_plain(value: Any) -> Any:
    """Return a nested value with objects in place of their plain forms.

    A dict that names an unknown class, or whose content does not fit, stays as it is.
    """
    kind = type(value)
    if kind in (dict, OrderedDict):
        maker = _MAKERS.get(value[CLASS]) if type(value.get(CLASS)) is str else None
        if maker is not None:
            try:
                return maker(value)
            except (KeyError, TypeError, ValueError, AttributeError, ImportError):
                return value
        return kind((key, from_plain(item)) for key, item in value.items())
    if kind in (list, tuple):
        return kind(from_plain(item) for item in value)
    return value


def _dict(plain: dict[str, Any]) -> Any:
    items = plain[_ITEMS]
    return type(items)((key, from_plain(item)) for key, item in items.items())


def _namespace(plain: dict[str, Any]) -> argparse.Namespace:
    made = argparse.Namespace()
    vars(made).update(from_plain(plain[_ITEMS]))
    return made


def _path(kind: type[pathlib.PurePath]) -> Callable[[dict[str, Any]], Any]:
    return lambda plain: kind(plain["path"])


def _number(plain: dict[str, Any]) -> Any:
    import numpy

    dtype, value = numpy.dtype(plain["dtype"]), plain["value"]
    if dtype.kind not in _KINDS or dtype.itemsize > 16 + 4 * len(str(value)):
        raise ValueError("this is not a number of NumPy")
    if dtype.kind in "mM":
        return numpy.int64(value).view(dtype)
    return numpy.array(value, dtype)[()]


# On another system a path of the one that saved it cannot be opened, but its parts can be read.
_IS_POSIX = os.name == "posix"

_MAKERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dict": _dict,
    "argparse.Namespace": _namespace,
    "pathlib.PurePosixPath": _path(pathlib.PurePosixPath),
    "pathlib.PosixPath": _path(pathlib.PosixPath if _IS_POSIX else pathlib.PurePosixPath),
    "pathlib.PureWindowsPath": _path(pathlib.PureWindowsPath),
    "pathlib.WindowsPath": _path(pathlib.PureWindowsPath if _IS_POSIX else pathlib.WindowsPath),
    "numpy": _number,
}
