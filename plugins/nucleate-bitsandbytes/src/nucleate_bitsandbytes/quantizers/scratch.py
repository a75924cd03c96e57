"""Memory for what lies between a weight and its codes: kept by each thread, since new memory costs page faults."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_kept = threading.local()

# A few chunks. A row may ask for more; that much is not kept.
_KEPT_NUMEL = 1 << 18


def scratch(name: str, numel: int, dtype: torch.dtype) -> Tensor:
    """Return memory of this thread, one-dimensional, with whatever is left in it.

    Args:
        name: Who asks. The same name and dtype mean the same memory.
        numel: How many elements.
        dtype: Their dtype.
    """
    held: dict[tuple[str, torch.dtype], Tensor] = _kept.__dict__.setdefault("held", {})
    buffer = held.get((name, dtype))
    if buffer is None or buffer.numel() < numel:
        # In inference mode it would be memory that nobody can write to outside of that mode.
        with torch.inference_mode(False):
            buffer = torch.empty(numel, dtype=dtype, device="cpu")
        if numel <= _KEPT_NUMEL:
            held[name, dtype] = buffer
    return buffer[:numel]
