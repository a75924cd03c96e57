"""Nested state as two parts: the tensors by where they stand, and the skeleton that is left without them.

This file decides which containers are looked into and how a place becomes a key. What may stand in a
skeleton is `values`' business, where tensors come from and go to the writer's and the loader's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nucleate.deferred import record_of
from nucleate.errors import CheckpointError, UsageError

#: Where something stands: the dict keys and list positions on the way to it.
KeyPath = tuple[Any, ...]


def key_of(path: KeyPath) -> str:
    """Return the one string that names the place `path`.

    >>> key_of(("model", "blocks.0.weight"))
    'model.blocks.0.weight'
    """
    return ".".join(map(str, path))


def split(tree: Any, path: KeyPath, tensors: dict[KeyPath, Tensor]) -> Any:
    """Return `tree` with None where tensors stood, and put those into `tensors`, by place.

    Only plain dicts, ordered dicts, lists and tuples are looked into; anything else is a leaf.

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
        skeleton: What `split` returned.
        path: The place of `skeleton` itself.
        tensor_at: Returns the tensor of a place, or None where there is none.
    """
    if skeleton is None:
        return tensor_at(path)
    if type(skeleton) in (dict, OrderedDict):
        return type(skeleton)((key, join(item, (*path, key), tensor_at)) for key, item in skeleton.items())
    if type(skeleton) in (list, tuple):
        return type(skeleton)(join(item, (*path, place), tensor_at) for place, item in enumerate(skeleton))
    return skeleton


def has_data(tensor: Tensor) -> bool:
    """Return whether `tensor` has memory, seen past whatever a subclass pretends."""
    # A deferred tensor is a meta tensor that says it is on the device it will live on.
    with torch._C.DisableTorchFunction():
        return not tensor.is_meta


def check_loadable(tensor: Tensor, key: str) -> None:
    """Make sure that `tensor` can be loaded into: it has memory, or a recipe that may be replaced.

    Raises:
        UsageError: It is on the meta device without a recipe.
        CheckpointError: It is sparse.
    """
    if record_of(tensor) is None:
        check_tensor(tensor, key)


def check_tensor(tensor: Tensor, key: str) -> None:
    """Make sure that `tensor` can be written from and read into.

    Raises:
        UsageError: It has no data yet.
        CheckpointError: It is sparse.
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
