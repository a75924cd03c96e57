"""Scratch memory for the conversion of weights: each thread keeps its own, because new memory costs page faults."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_kept = threading.local()

# A few chunks. A long row may need more memory, which is not kept.
_KEPT_NUMEL = 1 << 18


def scratch(name: str, numel: int, dtype: torch.dtype) -> Tensor:
    """Return one-dimensional memory of this thread, with the values that earlier calls left in it.

    Args:
        name: The name of the use. The same name and dtype mean the same memory.
        numel: The number of elements.
        dtype: The dtype of the elements.
    """
    held: dict[tuple[str, torch.dtype], Tensor] = _kept.__dict__.setdefault("held", {})
    buffer = held.get((name, dtype))
    if buffer is None or buffer.numel() < numel:
        # Memory made in inference mode could not be written to outside of that mode.
        with torch.inference_mode(False):
            buffer = torch.empty(numel, dtype=dtype, device="cpu")
        if numel <= _KEPT_NUMEL:
            held[name, dtype] = buffer
    return buffer[:numel]
