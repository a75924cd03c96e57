"""Everything in a checkpoint that is not a tensor, as the bytes of one uint8 tensor.

This file decides which values may be saved: those that torch reads back without running any code of the
file's choosing (`torch.load(weights_only=True)`). It refuses the others when they are saved, by name.
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

#: The key of the tensor that holds everything else.
VALUES = "nucleate.values"


@dataclass(frozen=True, slots=True)
class StateLayout:
    """How a saved state is put together: its values, and the place of each tensor in it.

    This is the layout of the values that every format of nucleate carries.

    Attributes:
        skeleton: The state with None where tensors stood.
        keys: The place of each tensor to its key.
        sharded: The key of each tensor that was sharded to the dims that were spread over ranks.
        modules: The places of the modules; of a checkpoint of version 1 none, because it does not tell.
        is_complete: Whether optimizers go by the names of their parameters, as `save` has it. It is false for a
            checkpoint that was converted from another library's.
    """

    skeleton: Any
    keys: Mapping[KeyPath, str]
    sharded: Mapping[str, list[int]]
    modules: tuple[KeyPath, ...] = ()
    is_complete: bool = True

    def encode(self) -> Tensor:
        """Return it as a uint8 tensor `(size_bytes,)`.

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
        """Return the layout of which `encode` wrote the fields.

        Args:
            found: The fields, as somebody read them who runs no code of the file's choosing.

        Raises:
            ValueError: They are not what `encode` writes.
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
            raise ValueError("they are not what `save` writes")
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
            "and dicts, lists and tuples of these; modules, optimizers and objects with `state_dict` and "
            "`load_state_dict` only as items of a dict, not of a list. "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'})"
        ) from error
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def decode(data: Tensor) -> Any:
    """Return what `encode` was given, from a contiguous CPU tensor.

    Raises:
        CheckpointError: The bytes are damaged, or hold what `encode` would have refused.
    """
    try:
        # Without numpy, which the core does not need, torch has no other quick way from a tensor to bytes.
        return torch.load(io.BytesIO(ctypes.string_at(data.data_ptr(), data.numel())), weights_only=True)
    except Exception as error:
        raise CheckpointError(f"the checkpoint's values cannot be read: {type(error).__name__}: {error}") from error


def _attempt(values: Any) -> tuple[bytes | None, Exception | None]:
    """Return the bytes of `values` if torch can read them back, else why not."""
    buffer = io.BytesIO()
    try:
        torch.save(values, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:
        return None, error
    return buffer.getvalue(), None


def _culprit(values: Any, path: KeyPath, error: Exception | None) -> tuple[KeyPath, Any, Exception | None]:
    """Return the place of the first innermost value that cannot be read back, the value, and why."""
    items: list[tuple[Any, Any]] = []
    if type(values) in (dict, OrderedDict):
        items = list(values.items())
    elif type(values) in (list, tuple):
        items = list(enumerate(values))
    for key, item in items:
        if (failure := _attempt(item)[1]) is not None:
            return _culprit(item, (*path, key), failure)
    return path, values, error
