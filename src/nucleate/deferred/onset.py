"""The onset of a late recording, which begins with the first call of `torch.empty` for a large tensor.

Recording and materializing cost time for each tensor, whatever its size, and save time for each element. So recording
does not pay for a constructor that makes only small tensors. Nobody knows beforehand which tensors a constructor will
make, so the modes are active from the beginning and do nothing until the onset.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: The function that may begin a recording. All modules of `torch.nn` get the memory of their weights by this call.
#: Other factories may also make the data of a dry run, which real weights then process.
FACTORY = torch.empty
_OPERATION = torch.ops.aten.empty.memory_format


class Onset:
    """The moment when a recording begins.

    Args:
        numel: The number of elements from which on a tensor is large.
    """

    def __init__(self, numel: int) -> None:
        self._numel = numel
        self._is_asked = False
        self._num_suspended = 0

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Surround a call of `torch.empty` by the constructor.

        Only these calls count. Torch computes some functions differently on different devices. Such a function is
        recorded whole or not at all, so a recording must not begin inside.
        """
        self._is_asked = True
        try:
            yield
        finally:
            self._is_asked = False

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Keep the recording from beginning."""
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
            is_for: Returns whether a factory with this `device` argument makes a tensor of the recorder's device.
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
