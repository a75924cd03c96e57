"""Temporary patches of a library, active while any thread constructs a model, and the integrations made of them."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

from nucleate.integrations.base import Integration


class Scoped:
    """A patch of a library for the whole process: the first context makes it, and the last one that ends undoes it.

    Contexts of several threads may overlap. So the patched functions must check whether their own thread defers.

    Args:
        install: Makes the change, and registers its undoing on the stack.
    """

    def __init__(self, install: Callable[[ExitStack], None]) -> None:
        self._install = install
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self._num_contexts = 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Return the context in which the library is patched."""
        with self._lock:
            if self._num_contexts == 0:
                with ExitStack() as stack:
                    self._install(stack)
                    self._stack = stack.pop_all()
            self._num_contexts += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_contexts -= 1
                if self._num_contexts == 0:
                    self._stack.close()


def put(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute of a module or class until a stack is closed.

    Args:
        stack: Restores the attribute, or deletes it if the owner itself did not have it.
        owner: A module or a class.
        name: The attribute's name.
        value: The attribute's new value.
    """
    if name in vars(owner):
        stack.callback(setattr, owner, name, vars(owner)[name])
    else:
        stack.callback(delattr, owner, name)
    setattr(owner, name, value)


class FileIntegration(Integration):
    """An integration that only changes how a library reads files inside `init_module`."""

    @abstractmethod
    def scoped(self) -> Scoped:
        """Return the patch, which is the same object for all runtimes."""

    def module_init_context(self) -> AbstractContextManager[object]:
        """Return the context in which the library's files are bound instead of read."""
        return self.scoped().entered()

    def setup(self, model: nn.Module) -> nn.Module:
        """Return the model unchanged."""
        return model
