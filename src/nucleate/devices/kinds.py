"""The names of kinds of device in torch, as in `Tensor.is_xpu`, `Tensor.xpu()` and `torch.xpu.FloatTensor`."""

from __future__ import annotations

import functools
import sys
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def is_kind(word: str) -> bool:
    """Return whether torch knows a kind of device by this name, also if it was not built for that kind.

    >>> is_kind("cpu"), is_kind("cpu:0"), is_kind("sparse")
    (True, False, False)
    """
    try:
        return torch.device(word).type == word
    except RuntimeError:
        return False


def current_accelerator() -> torch.device | None:
    """Return the accelerator that torch names as the current one, without an index, or None if its device is absent.

    This function only counts devices. `is_available` of a kind's module can be its first use, and then children that
    this process forks cannot use CUDA (`is_available` in torch/cuda/__init__.py, 2.13).
    """
    try:
        current = torch.accelerator.current_accelerator()
        return None if current is None or not torch.get_device_module(current).device_count() else current
    except (AttributeError, RuntimeError):
        return None  # A package has registered a name for its kind of device, but no module so far.


def available_accelerator() -> torch.device | None:
    """Return the current accelerator, or None if its own module says that it cannot be used."""
    try:
        return torch.accelerator.current_accelerator(check_available=True)
    except (AttributeError, RuntimeError):
        return None


def questions() -> dict[Any, str]:
    """Return the getters of properties such as `Tensor.is_cpu`, each with the kind of device that it tests for."""
    return _known(*_newest())[0]


def moves() -> dict[Any, str]:
    """Return methods such as `Tensor.cpu`, each with the kind of device that it moves to."""
    return _known(*_newest())[1]


def module_moves() -> list[str]:
    """Return the names of methods such as `Module.cpu`."""
    return [name for name in dir(torch.nn.Module) if _may_be_kind(name) and is_kind(name)]


def legacy_types(names: frozenset[str]) -> list[tuple[ModuleType, str, str]]:
    """Return torch's legacy tensor types, such as `torch.FloatTensor`: the module, the name and the kind of device.

    Args:
        names: The names of the types to return.
    """
    found = []
    for cls in torch._tensor_classes:
        _, _, kind = cls.__module__.partition(".")
        # The other modules hold sparse types.
        if cls.__name__ in names and (not kind or is_kind(kind)):
            found.append((sys.modules[cls.__module__], cls.__name__, kind or "cpu"))
    return found


def legacy_kind(type_name: str) -> str | None:
    """Return the kind of device in a name such as `"torch.xpu.FloatTensor"`, or None."""
    parts = type_name.split(".")
    return parts[1] if len(parts) == 3 and parts[0] == "torch" and is_kind(parts[1]) else None


def _newest() -> tuple[str, bool]:
    """Return facts that a package changes by adding a kind of device (torch/utils/backend_registration.py, 2.13)."""
    name = torch._C._get_privateuse1_backend_name()
    return name, hasattr(Tensor, name)


def _may_be_kind(word: str) -> bool:
    """Return whether `Tensor` has a getter such as `is_cpu` for a word. Asking torch about every word takes 15 ms."""
    return hasattr(Tensor, f"is_{word}")


@functools.cache
def _known(name: str, has_methods: bool) -> tuple[dict[Any, str], dict[Any, str]]:
    asking: dict[Any, str] = {}
    moving: dict[Any, str] = {}
    with warnings.catch_warnings():
        # torch warns that some names are deprecated.
        warnings.simplefilter("ignore")
        for attribute in dir(Tensor):
            kind = attribute.removeprefix("is_")
            if kind == "meta" or not _may_be_kind(kind) or not is_kind(kind):
                continue
            if kind == attribute:
                moving[getattr(Tensor, attribute)] = kind
            else:
                asking[getattr(Tensor, attribute).__get__] = kind
    return asking, moving
