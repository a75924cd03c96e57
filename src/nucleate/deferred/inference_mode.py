"""Inference mode: leaving it for a while, and ordinary tensors on the memory of tensors that were made in it.

torch marks the tensors that are made in `torch.inference_mode()`. Autograd refuses to train these inference tensors,
and outside of the mode nothing may write to them. A model must not depend on the mode in which somebody constructed,
loaded or set it up, so nucleate does these in `torch.no_grad()` instead, which makes the same values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Turn inference mode off inside the context, and keep gradients off there. In any other mode, change nothing."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    # Leaving inference mode turns gradients on.
    with torch.inference_mode(False), torch.no_grad():
        yield


def ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor that is not an inference tensor, with the values of another one.

    Args:
        tensor: A tensor. If it is strided, the result shares its memory; otherwise the result is a copy.

    Returns:
        The tensor itself, if it is not an inference tensor.
    """
    with torch._C.DisableTorchFunction():
        if not tensor.is_inference():
            return tensor
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            if tensor.layout != torch.strided or tensor.is_quantized or is_traceable_wrapper_subclass(tensor):
                return tensor.clone()
            alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
            if tensor.is_conj():
                alias = alias.conj()
            return torch._neg_view(alias) if tensor.is_neg() else alias
