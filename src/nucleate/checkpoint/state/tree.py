"""Nested state as two parts: the tensors by place, and the skeleton that is left without them.

This file decides which containers can hold tensors, and how a place becomes a key. `values` decides which values a
skeleton may hold. The writer and the loader decide where tensors come from and go to.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nucleate.deferred import record_of
from nucleate.errors import CheckpointError, UsageError

#: A place in a state: the dict keys and list positions that lead to it.
KeyPath = tuple[Any, ...]


def key_of(path: KeyPath) -> str:
    """Return the name of the place `path`, as one string.

    >>> key_of(("model", "blocks.0.weight"))
    'model.blocks.0.weight'
    """
    return ".".join(map(str, path))


def split(tree: Any, path: KeyPath, tensors: dict[KeyPath, Tensor]) -> Any:
    """Return `tree` with None where tensors stood, and put the tensors into `tensors`, by place.

    Only plain dicts, ordered dicts, lists and tuples are containers; everything else is a leaf.

    Args:
        tree: Any nesting of containers, tensors and values.
        path: The place of `tree` itself.
        tensors: Receives the tensors, detached but not copied.

    Raises:
        UsageError: A tensor has no data yet.
        CheckpointError: A tensor is sparse.
    """
    if isinstance(tree, Tensor):
        check_tensor(tree, key_of(path))
        tensors[path] = tree.detach()
        return None
    if type(tree) in (dict, OrderedDict):
        return type(tree)((key, split(item, (*path, key), tensors)) for key, item in tree.items())
    if type(tree) in (list, tuple):
        return type(tree)(split(item, (*path, place), tensors) for place, item in enumerate(tree))
    return tree


def join(skeleton: Any, path: KeyPath, tensor_at: Callable[[KeyPath], Tensor | None]) -> Any:
    """Return a copy of `skeleton` with tensors in their places: the inverse of `split`.

    Args:
        skeleton: The result of `split`.
        path: The place of `skeleton` itself.
        tensor_at: Returns the tensor of a place, or None for a place without a tensor.
    """
    if skeleton is None:
        return tensor_at(path)
    if type(skeleton) in (dict, OrderedDict):
        return type(skeleton)((key, join(item, (*path, key), tensor_at)) for key, item in skeleton.items())
    if type(skeleton) in (list, tuple):
        return type(skeleton)(join(item, (*path, place), tensor_at) for place, item in enumerate(skeleton))
    return skeleton


def has_data(tensor: Tensor) -> bool:
    """Return whether `tensor` has memory, without asking its subclass."""
    # A deferred tensor is a meta tensor that reports its later device.
    with torch._C.DisableTorchFunction():
        return not tensor.is_meta


def check_loadable(tensor: Tensor, key: str) -> None:
    """Make sure that a load can fill `tensor`: it has memory, or a recipe that the load may replace.

    Raises:
        UsageError: The tensor is on the meta device without a recipe.
        CheckpointError: The tensor is sparse.
    """
    if record_of(tensor) is None:
        check_tensor(tensor, key)


def check_tensor(tensor: Tensor, key: str) -> None:
    """Make sure that a save can read `tensor` and a load can write it.

    Raises:
        UsageError: The tensor has no data yet.
        CheckpointError: The tensor is sparse.
    """
    if not has_data(tensor):
        raise UsageError(
            f"{key} has no data: it is still deferred, or on the meta device. Call `runtime.setup(model)`, or "
            "give it values, before a checkpoint is saved from it or loaded into it."
        )
    if tensor.layout is not torch.strided:
        raise CheckpointError(
            f"{key} is a tensor of layout {tensor.layout}; only dense (strided) tensors can be saved. Save "
            "`tensor.to_dense()`, or its indices and values as two tensors."
        )
