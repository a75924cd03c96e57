"""Moves a model's tensors to a device so that every identity and every shared storage survives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move parameters, gradients and buffers to `device`, in place.

    Parameters and buffers stay the same objects, so ties and optimizers hold; tensors that share a storage
    share one afterwards too, which `nn.Module.to` would not keep. What is on `device` already, as deferred
    tensors say of themselves, and what is on the meta device is left alone.

    Args:
        model: The module to move.
        device: Where to.
    """
    elsewhere = [
        tensor
        for tensor in [*model.parameters(), *model.buffers()]
        if tensor.device != device and tensor.device.type != "meta"
    ]
    if elsewhere:
        transfer(elsewhere, lambda tensor: tensor.to(device))
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()  # cuDNN wants the weights in one buffer; nothing happens elsewhere.
    return model


def transfer(tensors: list[Tensor], copy: Callable[[Tensor], Tensor]) -> None:
    """Give each tensor a copy of its data, each storage copied once.

    Args:
        tensors: Parameters and buffers, which stay the same objects.
        copy: Makes the copy of a plain tensor, somewhere else.
    """
    # The old storage is kept beside the new one: the address of a freed storage could be given to another.
    storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
    for tensor in tensors:
        gradient = tensor.grad if tensor.is_leaf else None
        if gradient is not None:
            tensor.grad = None
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            tensor.data = copy(tensor.data)  # A subclass knows best what copying it means.
        else:
            old = tensor.untyped_storage()
            if old._cdata not in storages:
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(old)
                storages[old._cdata] = (old, copy(whole).untyped_storage())
            new = storages[old._cdata][1]
            view = torch.empty(0, dtype=tensor.dtype, device=new.device)
            tensor.data = view.set_(new, tensor.storage_offset(), tensor.size(), tensor.stride())
        if gradient is not None:
            tensor.grad = copy(gradient)
