"""The wrappers that `runtime.setup` returns: the user's objects, with plugins around forward, step and iteration."""

from nucleate.wrappers.dataloader import DataLoaderWrapper
from nucleate.wrappers.module import ModuleWrapper
from nucleate.wrappers.optimizer import OptimizerWrapper
from nucleate.wrappers.wrapped import is_wrapped

__all__ = ["DataLoaderWrapper", "ModuleWrapper", "OptimizerWrapper", "is_wrapped"]
