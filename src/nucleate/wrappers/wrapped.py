"""The question whether `setup` returned an object, whatever stands around it."""

from __future__ import annotations

from torch import nn

from nucleate.shells import inside
from nucleate.wrappers.dataloader import DataLoaderWrapper
from nucleate.wrappers.module import ModuleWrapper
from nucleate.wrappers.optimizer import OptimizerWrapper


def is_wrapped(obj: object) -> bool:
    """Return whether a `Runtime` has set this object up: a model, an optimizer or a data loader.

    A model that was compiled after its setup counts too. The user's own model inside of the wrapper does not.

    Args:
        obj: Any object.
    """
    if isinstance(obj, nn.Module):
        obj = inside(obj, ModuleWrapper)
    # By the type: the wrapper of an optimizer says that its class is the user's.
    return issubclass(type(obj), (ModuleWrapper, OptimizerWrapper, DataLoaderWrapper))
