"""Values: everything in a checkpoint that is not a tensor, as the bytes of one uint8 tensor.

This file decides which values a save allows: those that torch reads back without running code that the file chooses
(`torch.load(weights_only=True)`). The error for any other value names its place in the state.
"""

from __future__ import annotations

import ctypes
import io
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nucleate.checkpoint.state.tree import KeyPath, key_of
from nucleate.errors import CheckpointError

#: The key of the tensor that holds all values.
VALUES = "nucleate.values"


@dataclass(frozen=True, slots=True)
class StateLayout:
    """The structure of a saved state: its values, and the place of each tensor.

    Every format of nucleate stores this structure among its values.

    Attributes:
        skeleton: The state with None where tensors stood.
        keys: The place of each tensor to its key.
        sharded: The key of each tensor that was sharded to the dims that were spread over ranks.
        modules: The places of the modules; empty for a checkpoint of version 1, which does not store them.
        is_complete: Whether optimizer states name their parameters, as `save` writes them. It is false for a
            checkpoint that was converted from another library's.
    """

    skeleton: Any
    keys: Mapping[KeyPath, str]
    sharded: Mapping[str, list[int]]
    modules: tuple[KeyPath, ...] = ()
    is_complete: bool = True

    def encode(self) -> Tensor:
        """Return the structure as a uint8 tensor `(size_bytes,)`.

        Raises:
            CheckpointError: A value could not be read back; the message names its place in the state.
        """
        encode(self.skeleton)  # first by itself, so that the message names the place in the user's state
        fields = {
            "skeleton": self.skeleton,
            "keys": dict(self.keys),
            "sharded": dict(self.sharded),
            "modules": list(self.modules),
        }
        return encode(fields if self.is_complete else {**fields, "is_complete": False})

    @classmethod
    def from_fields(cls, found: Any) -> StateLayout:
        """Return the layout whose fields `encode` wrote.

        Args:
            found: The fields, read without running code that the file chooses.

        Raises:
            ValueError: These are not fields that `encode` writes.
        """
        try:
            layout = cls(
                found["skeleton"],
                found["keys"],
                found["sharded"],
                tuple(tuple(place) for place in found.get("modules", ())),
                found.get("is_complete", True) is True,
            )
            right = (
                isinstance(layout.skeleton, dict)
                and all(isinstance(place, tuple) and isinstance(key, str) for place, key in layout.keys.items())
                and all(type(dim) is int for dims in layout.sharded.values() for dim in dims)
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if not right:
            raise ValueError("they are not the fields that `save` writes")
        return layout


def encode(values: Any) -> Tensor:
    """Return `values` as a uint8 tensor `(size_bytes,)`.

    Raises:
        CheckpointError: A value could not be read back; the message names its place.
    """
    data, error = _attempt(values)
    if data is None:
        path, culprit, error = _culprit(values, (), error)
        raise CheckpointError(
            f"{key_of(path) or 'the state'} is a {type(culprit).__module__}.{type(culprit).__qualname__}, which a "
            "checkpoint cannot hold. Allowed are tensors, numbers, strings, bytes, None, torch dtypes and devices, "
            "`argparse.Namespace`, paths, numbers of NumPy, "
            "and dicts, lists and tuples of these; modules, optimizers and objects with `state_dict` and "
            "`load_state_dict` only as items of a dict, not of a list. "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'})"
        ) from error
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def decode(data: Tensor) -> Any:
    """Return the values that `encode` wrote into a contiguous CPU tensor.

    Raises:
        CheckpointError: The bytes are damaged, or hold a value that `encode` refuses.
    """
    try:
        # torch has no other quick way from a tensor to bytes without NumPy, which the core does not need.
        return torch.load(io.BytesIO(ctypes.string_at(data.data_ptr(), data.numel())), weights_only=True)
    except Exception as error:
        raise CheckpointError(f"the checkpoint's values cannot be read: {type(error).__name__}: {error}") from error


def _attempt(values: Any) -> tuple[bytes | None, Exception | None]:
    """Return the bytes of `values` if torch can read them back, else the error."""
    buffer = io.BytesIO()
    try:
        torch.save(values, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:
        return None, error
    return buffer.getvalue(), None


def _culprit(values: Any, path: KeyPath, error: Exception | None) -> tuple[KeyPath, Any, Exception | None]:
    """Return the place of the first innermost value that cannot be read back, the value, and the error."""
    items: list[tuple[Any, Any]] = []
    if type(values) in (dict, OrderedDict):
        items = list(values.items())
    elif type(values) in (list, tuple):
        items = list(enumerate(values))
    for key, item in items:
        if (failure := _attempt(item)[1]) is not None:
            return _culprit(item, (*path, key), failure)
    return path, values, error
