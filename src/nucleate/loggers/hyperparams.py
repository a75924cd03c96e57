"""The settings of a run as a flat dict, from the kinds of objects in which scripts hold them."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from nucleate.errors import UsageError


def flatten(params: Any) -> dict[str, Any]:
    """Return settings as a flat dict. `/` joins the names of nested ones.

    Values that are not numbers, texts, booleans or None become texts.

    Args:
        params: A dict, a dataclass or an `argparse.Namespace`.

    Raises:
        UsageError: `params` is of another type.

    Example:
        >>> flatten({"lr": 0.1, "model": {"width": 64}})
        {'lr': 0.1, 'model/width': 64}
    """
    fields = _fields(params)
    if fields is None:
        raise UsageError(f"hyperparameters are a dict, a dataclass or a Namespace, not {type(params).__name__}.")
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if _fields(value) is not None:
            flat.update({f"{name}/{inner}": leaf for inner, leaf in flatten(value).items()})
        else:
            flat[str(name)] = value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
    return flat


def _fields(params: Any) -> dict[Any, Any] | None:
    if isinstance(params, Mapping):
        return dict(params)
    if isinstance(params, Namespace):
        return vars(params)
    if dataclasses.is_dataclass(params) and not isinstance(params, type):
        return {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    return None
