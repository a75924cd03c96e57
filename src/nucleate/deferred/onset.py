"""The onset of a recording that begins late: with the first call of `torch.empty` for a large tensor.

Recording and making cost time for each tensor, whatever its size, and save time for each element. So a constructor that
makes small tensors only is better left alone. Nobody knows beforehand what a constructor will make: its modes are
active from the beginning and do nothing until the onset.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: What may begin a recording. All modules of `torch.nn` take the memory of their weights by this call. Other factories
#: may as well make the data of a dry run, on which real weights then work.
FACTORY = torch.empty
_OPERATION = torch.ops.aten.empty.memory_format


class Onset:
    """Says when a recording begins.

    Args:
        numel: The number of elements of a tensor that is large.
    """

    def __init__(self, numel: int) -> None:
        self._numel = numel
        self._is_asked = False
        self._num_suspended = 0

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Surround a call of `torch.empty` by the constructor.

        Only these calls count. A function that torch computes in another way on another device is recorded whole or
        not at all, so a recording must not begin inside.
        """
        self._is_asked = True
        try:
            yield
        finally:
            self._is_asked = False

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let nothing begin."""
        self._num_suspended += 1
        try:
            yield
        finally:
            self._num_suspended -= 1

    def is_now(
        self, is_for: Callable[[torch.device | None], bool], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Return whether a recorder that has done nothing so far begins with this operation.

        Args:
            is_for: Tells whether a factory that is told this device, or none, makes a tensor for the recorder's.
            func: The operation.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
        """
        return (
            self._is_asked
            and not self._num_suspended
            and func is _OPERATION
            and math.prod(args[0]) >= self._numel
            and kwargs.get("layout") in (None, torch.strided)
            and is_for(kwargs.get("device"))
        )
