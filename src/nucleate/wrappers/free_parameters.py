"""Free parameters: real parameters of an optimizer that no model has, such as a learned temperature.

No strategy lays them out, so this file does what a strategy does for the parameters of a model: all ranks begin with
rank 0's value, and all ranks step with the average of their gradients. The average is taken when the optimizer steps,
and not in each backward: a rank whose loss does not use the parameter must not wait in its backward, and gradients that
accumulate over several backwards are exchanged once.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nucleate.cluster.communicator import Communicator
from nucleate.cluster.watch import CALLS
from nucleate.deferred import handle_of
from nucleate.errors import RankDisagreementError, UsageError, name_list
from nucleate.layout import LiveLayout, is_sharded
from nucleate.wrappers.replaced import refuse_replaced


class FreeParameters:
    """The free parameters of all optimizers of one runtime.

    Args:
        communicator: The communicator of this process.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._of: WeakKeyDictionary[Optimizer, list[Tensor]] = WeakKeyDictionary()

    def of(self, optimizer: Optimizer) -> list[Tensor]:
        """Return the free parameters of an optimizer, in their order.

        Args:
            optimizer: The user's optimizer, without its wrapper.
        """
        return self._of.get(optimizer, [])

    def find(self, optimizer: Optimizer, parameters: Iterable[Any], known: Container[int]) -> list[Tensor]:
        """Return the free ones among the parameters of an optimizer, before anything is changed.

        Args:
            optimizer: The user's optimizer.
            parameters: Its parameters, or others that it will get.
            known: The ids of the parameters of all models that were set up.

        Raises:
            UsageError: A parameter that no model has was replaced by `setup`, has no value yet, is sharded, or is not
                on the device of the runtime.
        """
        name = type(optimizer).__name__
        strangers = [p for p in parameters if isinstance(p, Tensor) and id(p) not in known]
        refuse_replaced(name, strangers)
        deferred = [_describe(p) for p in strangers if handle_of(p) is not None or p.is_meta]
        if deferred:
            raise UsageError(
                f"{name} has {len(deferred)} parameters without values: {name_list(deferred)}. Set up their model "
                "first, or pass both: `model, optimizer = runtime.setup(model, optimizer)`. Make a parameter that no "
                "model has outside of `init_module`."
            )
        sharded = [_describe(p) for p in strangers if is_sharded(p)]
        if sharded and self._communicator.world_size > 1:
            raise UsageError(
                f"{name} has {len(sharded)} sharded parameters that no model has: {name_list(sharded)}. Put them into "
                "a module and set it up, or make them plain parameters."
            )
        device = self._communicator.device
        elsewhere = [f"{_describe(p)} on {p.device}" for p in strangers if not is_on(p, device)]
        if elsewhere:
            raise UsageError(
                f"{name} has {len(elsewhere)} parameters that no model has and that are not on {device}, the device of "
                f"this runtime: {name_list(elsewhere)}. Make them there: "
                "`torch.nn.Parameter(torch.zeros(..., device=runtime.device))`."
            )
        return list({id(p): p for p in strangers}.values())

    def agree(self, found: Sequence[Sequence[Tensor]]) -> None:
        """Make sure that all ranks have free parameters of the same shapes and dtypes. Every rank calls this method.

        Args:
            found: The free parameters of each optimizer.

        Raises:
            RankDisagreementError: The ranks differ. Every rank raises it.
        """
        if self._communicator.world_size == 1:
            return
        ranks = self._communicator.gather_objects(description(found))
        for rank, other in enumerate(ranks):
            if other != ranks[0]:
                raise RankDisagreementError(
                    f"the parameters of the optimizers that no model has are {ranks[0]} on rank 0 but {other} on rank "
                    f"{rank}. Give the optimizers of all ranks the same parameters, in the same order."
                )

    def add(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Give parameters rank 0's values, and average their gradients from now on. Every rank calls this method.

        Args:
            optimizer: The user's optimizer.
            parameters: Free parameters on which the ranks agree.
        """
        if not parameters:
            return
        if self._communicator.world_size > 1:
            values = self._communicator.broadcast([parameter.detach() for parameter in parameters])
            with torch.no_grad():
                for parameter, value in zip(parameters, values, strict=True):
                    if value is not parameter:
                        parameter.copy_(value)
        known = {id(parameter): parameter for parameter in (*self.of(optimizer), *parameters)}
        self._of[optimizer] = list(known.values())

    def follow(self, optimizer: Optimizer, clone: Optimizer) -> None:
        """Treat the parameters of a copied optimizer as those of the original.

        Args:
            optimizer: The original.
            clone: A copy with the same groups, whose parameters may be copies too.
        """
        free = {id(parameter) for parameter in self.of(optimizer)}
        if free and clone is not optimizer:
            pairs = zip(_parameters(optimizer), _parameters(clone), strict=True)
            self._of[clone] = [copied for parameter, copied in pairs if id(parameter) in free]

    def average(self, optimizer: Optimizer) -> None:
        """Give the free parameters of an optimizer the average of all ranks' gradients. Every rank calls this method.

        A rank without a gradient counts as one with zeros. A parameter without a gradient on all ranks stays without
        one. A second call changes nothing: an average of equal gradients is the gradient.

        Args:
            optimizer: The user's optimizer, without its wrapper.
        """
        free = self._of.get(optimizer)
        if not free or self._communicator.world_size == 1:
            return
        lots: dict[torch.dtype, list[Tensor]] = {}
        for parameter in free:
            is_double = parameter.dtype in (torch.float64, torch.complex128)
            # A sum in half precision would round, or overflow.
            lots.setdefault(torch.float64 if is_double else torch.float32, []).append(parameter)
        with CALLS.exchange("step"), torch.no_grad():
            for dtype, lot in lots.items():
                self._average(lot, dtype)

    def averaging(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure that averages gradients after the backward of another closure.

        Args:
            optimizer: The user's optimizer, without its wrapper.
            closure: Computes the loss and the gradients.
        """
        if optimizer not in self._of:
            return closure

        def averaged() -> Any:
            loss = closure()
            self.average(optimizer)
            return loss

        return averaged

    def _average(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Average the gradients of some parameters by a single exchange in `dtype`."""
        import torch.distributed as dist

        device = self._communicator.device
        flat = [_flat(parameter, dtype) for parameter in parameters]
        # 1 for each parameter that has a gradient on this rank, so that the sum tells whether any rank has one.
        present = torch.tensor([float(p.grad is not None) for p in parameters], dtype=dtype, device=device)
        total = torch.cat([*flat, present])
        dist.all_reduce(total)
        *values, counts = total.split([*(part.numel() for part in flat), len(parameters)])
        for place, (parameter, value) in enumerate(zip(parameters, values, strict=True)):
            # Only a rank without a gradient has to look at the sum, which waits for the device.
            if parameter.grad is None and counts[place].item() == 0:
                continue
            mean = value.div_(dist.get_world_size())
            if parameter.is_complex():
                mean = torch.view_as_complex(mean.view(*parameter.shape, 2))
            mean = mean.view(parameter.shape).to(parameter.dtype)
            if parameter.grad is not None and parameter.grad.layout is torch.strided:
                parameter.grad.copy_(mean)
            else:
                parameter.grad = mean.clone()  # not a view of the exchanged memory


def known_ids(models: Iterable[nn.Module]) -> set[int]:
    """Return the ids of the parameters of models that were set up."""
    return set().union(*(LiveLayout.of(model).ids for model in models))


def description(found: Iterable[Iterable[Tensor]]) -> str:
    """Describe the free parameters of several optimizers, so that ranks can compare them.

    Args:
        found: The free parameters of each optimizer.
    """
    return "; ".join(name_list(f"{p.dtype} {tuple(p.shape)}" for p in some) for some in found)


def _flat(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros(
            parameter.numel() * (2 if parameter.is_complex() else 1), dtype=dtype, device=parameter.device
        )
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    return gradient.reshape(-1).to(dtype)


def is_on(tensor: Tensor, device: torch.device) -> bool:
    """Return whether a tensor is on a device; a device without an index is the current one of its kind."""
    there = tensor.device
    return there.type == device.type and (None in (there.index, device.index) or there.index == device.index)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _describe(parameter: Tensor) -> str:
    handle = handle_of(parameter)
    return f"a parameter of shape {tuple(parameter.shape)}" if handle is None else handle.fqn
