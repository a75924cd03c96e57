"""Deferred tensors that are bound to the bytes of a file: a load that happens inside a construction reads nothing.

A library that loads a checkpoint while its model is constructed gets these tensors instead of real ones. Its renaming,
casting, splitting and copying is then recorded like the rest of the constructor, and `setup` reads the bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.deferred import give, is_recording, record_of


def defers(device: torch.device) -> bool:
    """Return whether a tensor that this thread makes now for a device is deferred."""
    if not is_recording():
        return False
    try:
        made = torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # torch has no such device here, and says so in several ways.
        return False
    return record_of(made) is not None


def bound(stored: StoredTensor, device: torch.device) -> Tensor:
    """Return a new deferred tensor whose content is a stored tensor.

    Args:
        stored: The elements and their place in a file.
        device: A device for which this thread defers.
    """
    tensor = torch.empty(stored.shape, dtype=stored.dtype, device=device)
    if stored.numel:
        give(tensor, stored)
    return tensor
