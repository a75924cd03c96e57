"""Placement of a model's tensors on a device, which keeps every tensor object and every shared storage."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nucleate.deferred import handle_of
from nucleate.devices import Staging
from nucleate.devices.staging import aligned
from nucleate.errors import UsageError, name_list
from nucleate.materialize.handover import swap
from nucleate.shells import named_buffers, named_parameters


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """Move parameters, gradients and buffers to `device`, in place.

    Parameters and buffers stay the same objects, so ties and optimizers stay valid. Tensors that share a storage still
    share one afterwards, unlike with `nn.Module.to`. Tensors that are already on `device`, on the meta device or
    deferred are left alone.

    Args:
        model: The module to move.
        device: The target device.

    Raises:
        UsageError: Autograd still holds a tensor, so torch cannot move it to this device. Nothing has been moved.
    """
    elsewhere = {
        tensor: name
        for name, tensor in (*named_parameters(model), *named_buffers(model))
        if handle_of(tensor) is None and tensor.device != device and tensor.device.type != "meta"
    }
    if elsewhere:
        recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
        with _without_weak_references(recurrent):
            _refuse_held(elsewhere, device)
            with _copies_to(device, list(elsewhere)) as copy:
                transfer(list(elsewhere), copy)
        for module in recurrent:
            module.flatten_parameters()  # cuDNN wants the weights in one buffer; on other devices this does nothing.
    return model


def transfer(tensors: list[Tensor], copy: Callable[[Tensor], Tensor]) -> None:
    """Give each tensor a copy of its data; each storage is copied once.

    Args:
        tensors: Parameters and buffers, which stay the same objects.
        copy: Returns a copy of a plain tensor in another place.
    """
    # The old storage is kept beside the new one: a new storage could get the address of a freed one.
    storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
    for tensor in tensors:
        gradient = tensor.grad if tensor.is_leaf else None
        if gradient is not None:
            tensor.grad = None
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            _set_value(tensor, copy(tensor.data))  # A subclass defines its own way to copy.
        else:
            old = tensor.untyped_storage()
            if old._cdata not in storages:
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(old)
                storages[old._cdata] = (old, copy(whole).untyped_storage())
            new = storages[old._cdata][1]
            view = torch.empty(0, dtype=tensor.dtype, device=new.device)
            _set_value(tensor, view.set_(new, tensor.storage_offset(), tensor.size(), tensor.stride()))
        if gradient is not None:
            tensor.grad = copy(gradient)


@contextmanager
def _copies_to(device: torch.device, tensors: list[Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield a function that copies a tensor to a device, from host memory through one ring of pinned buffers.

    All copies are complete when the context ends.
    """
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if _crosses(t, device)}
    gradients = [t.grad for t in tensors if t.is_leaf and t.grad is not None and _crosses(t.grad, device)]
    sizes = [*storages.values(), *(gradient.numel() * gradient.element_size() for gradient in gradients)]
    if not sizes:
        yield lambda tensor: tensor.to(device)
        return
    with Staging(device, sum(map(aligned, sizes))) as staging:
        # A gradient that can be differentiated keeps its graph.
        yield lambda t: staging.copied(t) if _crosses(t, device) and not t.requires_grad else t.to(device)


def _crosses(tensor: Tensor, device: torch.device) -> bool:
    """Return whether a tensor is plain host memory and the target is another device."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return is_plain and tensor.device.type == "cpu" != device.type


def _set_value(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor the data of another tensor, which may be on any device."""
    if torch._has_compatible_shallow_copy_type(tensor, value):
        tensor.data = value
        return
    # Not compatible, as with the CPU and devices of other packages (`has_compatible_shallow_copy_type` in
    # c10/core/TensorImpl.h, torch 2.13).
    attributes = vars(tensor).copy()
    if isinstance(tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
    elif tensor.requires_grad:
        value.requires_grad_()
    if type(value) is not type(tensor):
        value.__class__ = type(tensor)
    # A subclass may keep its parts in its attributes; the parts of `value` are already in the new place.
    vars(value).update({name: item for name, item in attributes.items() if name not in vars(value)})
    if weakref.getweakrefs(tensor):
        # `swap_tensors` refuses a tensor with weak references. Here they stay valid, because the object stays the same.
        # `_refuse_held` has checked other references, and class and attributes of both tensors are alike.
        inside = vars(value).copy()
        swap(tensor, value, by=torch._C._swap_tensor_impl)
        vars(tensor).update(inside)
    else:
        swap(tensor, value)


def _refuse_held(tensors: dict[Tensor, str], device: torch.device) -> None:
    there = torch.empty(0, device=device)
    held = [
        name
        for tensor, name in tensors.items()
        if not torch._has_compatible_shallow_copy_type(tensor, there) and _is_held(tensor)
    ]
    if held:
        raise UsageError(
            f"{name_list(held)} cannot be moved to {device}: an autograd graph still holds them, or they are the "
            "result of a computation. Move the model before its forward runs, or after the backward."
        )


def _is_held(tensor: Tensor) -> bool:
    """Return whether other references make a swap of the tensor wrong (`torch.utils.swap_tensors`, 2.13)."""
    if not tensor.is_leaf or _num_references(tensor) > 2:
        return True
    if _num_references(tensor) == 1:
        return False
    if not tensor.requires_grad or weakref.getweakrefs(tensor):
        return True
    # The node that accumulates the tensor's gradient. After `swap_tensors` this node fails if it runs. The lookup may
    # just have created the node.
    node = torch.autograd.graph.get_gradient_edge(tensor).node
    is_node = _num_references(tensor) == 2
    del node
    return not is_node


def _num_references(tensor: Any) -> int:
    count: int = tensor._use_count()
    return count


@contextmanager
def _without_weak_references(modules: list[nn.RNNBase]) -> Iterator[None]:
    """Remove the weak references to flat weights (torch/nn/modules/rnn.py), which `swap_tensors` refuses."""
    for module in modules:
        module._flat_weight_refs = []
    try:
        yield
    finally:
        for module in modules:
            module._flat_weight_refs = [None if w is None else weakref.ref(w) for w in module._flat_weights]
