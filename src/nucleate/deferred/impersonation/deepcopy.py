"""Copies of deferred tensors, by the rules of eager torch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from nucleate.deferred.inference_mode import outside_inference_mode


def deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """Copy a deferred tensor as `Tensor.__deepcopy__` (torch/_tensor.py, 2.13) copies a real one.

    It copies each storage once, so that tensors that share a storage also share it in the copy. On the meta device
    torch clones each tensor instead.

    Args:
        tensor: A leaf of exactly the class `Tensor`.
        memo: The memo of `copy.deepcopy`.
    """
    if id(tensor) in memo:
        return memo[id(tensor)]  # type: ignore[no-any-return]
    with torch.no_grad():
        storages = memo.setdefault("torch", {})  # type: ignore[call-overload]
        storage = tensor.untyped_storage()
        copied = storages.get(storage._cdata)
        if copied is None:
            content = look(storage, torch.uint8, 0, (storage.nbytes(),), (1,))
            copied = storages[storage._cdata] = content.clone().untyped_storage()
        twin = look(copied, tensor.dtype, int(tensor.storage_offset()), tuple(tensor.size()), tensor.stride())
        if tensor.is_conj():
            twin = twin.conj_physical()
        if tensor.is_neg():
            twin = twin.neg()
        if tensor.requires_grad:
            twin.requires_grad_()
        if tensor.grad is not None:
            twin.grad = copy.deepcopy(tensor.grad, memo)
        twin.__dict__ = copy.deepcopy(tensor.__dict__, memo)
    memo[id(tensor)] = twin
    return twin


def look(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    """Return a tensor on a storage without memory. This needs no step on the tape."""
    with torch._C.DisableTorchFunction(), _disable_current_modes(), outside_inference_mode():
        return torch.empty(0, dtype=dtype, device="meta").set_(storage, offset, size, stride)
