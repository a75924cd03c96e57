"""Changes to a library that last as long as some thread constructs a model, and integrations that consist of one."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

from nucleate.integrations.base import Integration


class Scoped:
    """A change to a library for the whole process, made by the first context and undone by the last one that ends.

    Contexts of several threads may overlap. So what is put into the library has to ask whether its own thread defers.

    Args:
        install: Makes the change, and tells the stack how to undo it.
    """

    def __init__(self, install: Callable[[ExitStack], None]) -> None:
        self._install = install
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self._num_contexts = 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have the library changed."""
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
    """Give an object of a library another attribute until a stack is closed.

    Args:
        stack: Puts the attribute back, or takes it away where the object itself had none.
        owner: A module or a class.
        name: The attribute's name.
        value: The attribute.
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
        """Return the change, the same one for all runtimes."""

    def module_init_context(self) -> AbstractContextManager[object]:
        """Return the context in which the library's files are bound instead of read."""
        return self.scoped().entered()

    def setup(self, model: nn.Module) -> nn.Module:
        """Return the model as it is."""
        return model
