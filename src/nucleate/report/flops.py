"""The floating point operations of a model, counted on meta tensors: nothing is computed and nothing allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from nucleate.errors import UsageError
from nucleate.shells import inside


def measure_flops(
    model: nn.Module, forward_fn: Callable[[], Any], loss_fn: Callable[[Any], Tensor] | None = None
) -> int:
    """Count the floating point operations of a forward, and of its backward with `loss_fn`.

    The model may be deferred. It stays as it is: its parameters and buffers are replaced by meta tensors while
    `forward_fn` runs, gradients are not kept, and no random number is drawn. Inputs may be on any device. torch counts
    products of matrices, convolutions and attention (`torch.utils.flop_counter`).

    Args:
        model: The model, before `setup`.
        forward_fn: Calls the model, as in `lambda: model(x)`, and returns the output.
        loss_fn: Computes the loss from the output. Without it, only the forward is counted.

    Returns:
        The number of operations of this process.

    Raises:
        UsageError: The model was set up or is sharded, or its forward needs a value, which meta tensors do not have.

    Example:
        >>> model = nn.Linear(4, 2, bias=False)
        >>> measure_flops(model, lambda: model(torch.ones(3, 4)))
        48
    """
    from torch.utils.flop_counter import FlopCounterMode

    _refuse_set_up(model)
    counter = FlopCounterMode(display=False)
    with _on_meta(model), torch.enable_grad(), counter, _Meta():  # type: ignore[no-untyped-call]
        try:
            output = forward_fn()
            if loss_fn is not None:
                loss_fn(output).backward()
        except RuntimeError as error:
            if "meta" not in str(error).lower():
                raise
            raise UsageError(
                f"measure_flops: the forward of {type(model).__name__} needs the value of a tensor, and operations are "
                f"counted without values: {error}"
            ) from error
    return counter.get_total_flops()


class _Meta(TorchDispatchMode):
    """Runs each operation on meta tensors in place of its arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        args, kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


def _to_meta(tensor: Tensor) -> Tensor:
    if tensor.device.type == "meta":
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _refuse_set_up(model: nn.Module) -> None:
    plain = inside(model)
    # The class is not imported: it stands above this package.
    if type(plain).__name__ == "ModuleWrapper" or any(_is_dtensor(tensor) for tensor in plain.parameters()):
        raise UsageError(
            f"measure_flops takes a model before `setup`, and this {type(plain).__name__} was set up. Construct the "
            "model a second time inside `init_module(empty_init=True)`, which allocates nothing."
        )


def _is_dtensor(tensor: Tensor) -> bool:
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


@contextmanager
def _on_meta(model: nn.Module) -> Iterator[None]:
    """Give a model meta tensors inside the context. Tied tensors stay tied."""
    places: list[tuple[Any, str, Tensor]] = [
        (registry, name, tensor)
        for module in model.modules()
        for registry in (module._parameters, module._buffers)
        for name, tensor in registry.items()
        if tensor is not None
    ]
    made: dict[int, Tensor] = {}
    for _, _, tensor in places:
        if id(tensor) not in made:
            bare = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if is_parameter else bare
    try:
        for registry, name, tensor in places:
            registry[name] = made[id(tensor)]
        yield
    finally:
        for registry, name, tensor in places:
            registry[name] = tensor
