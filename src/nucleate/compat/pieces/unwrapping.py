"""The objects inside wrappers."""

from __future__ import annotations

from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection

from nucleate.wrappers import DataLoaderWrapper, ModuleWrapper, OptimizerWrapper


def unwrap_objects(collection: Any) -> Any:
    """Return a collection with the user's model, optimizer or loader in place of each wrapper.

    Args:
        collection: A wrapper, or a collection of objects.
    """
    return apply_to_collection(collection, (ModuleWrapper, OptimizerWrapper, DataLoaderWrapper), _inner)


def _inner(wrapper: Any) -> Any:
    if type(wrapper) is DataLoaderWrapper:
        return wrapper.loader
    return wrapper.optimizer if isinstance(wrapper, OptimizerWrapper) else wrapper.module
