"""The mark on tensors that were deferred and are about to get their value.

A strategy shards plain meta tensors, without guards. Where it fails in between, the mark tells them from tensors that
were built on the meta device by hand, which have no value to lose.
"""

from __future__ import annotations

from torch import Tensor

_NAME = "_nucleate_released"


def mark_released(tensor: Tensor) -> None:
    """Mark a tensor whose guard was taken off for a strategy."""
    tensor.__dict__[_NAME] = True


def unmark_released(tensor: Tensor) -> None:
    """Take the mark off."""
    tensor.__dict__.pop(_NAME, None)


def is_released(tensor: Tensor) -> bool:
    """Return whether a tensor has the mark."""
    return _NAME in tensor.__dict__
