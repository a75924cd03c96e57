"""Deferred tensors that are bound to the bytes of a file: a load inside a construction reads nothing.

A library that loads a checkpoint while it constructs its model gets these tensors instead of real ones. The recording
then holds the library's renaming, casting, splitting and copying like the rest of the constructor. `setup` reads the
bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.deferred import bind, is_recording, record_of


def defers(device: torch.device) -> bool:
    """Return whether a tensor that this thread now makes for a device is deferred."""
    if not is_recording():
        return False
    try:
        made = torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # torch has no such device here, and says so in several ways.
        return False
    return record_of(made) is not None


def bound(stored: StoredTensor, device: torch.device) -> Tensor:
    """Return a new deferred tensor that is bound to a stored tensor.

    Args:
        stored: The elements and their place in a file.
        device: A device for which this thread defers.
    """
    tensor = torch.empty(stored.shape, dtype=stored.dtype, device=device)
    if stored.numel:
        bind(tensor, stored)
    return tensor
