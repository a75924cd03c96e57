"""A block of construction without a choice to defer or not: it defers where that pays, and ends with real tensors.

After the block a script may call, edit or save the model, also before `setup` or without it. Whether that works must
not depend on the model's size. So the end of the block materializes all deferred tensors.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nucleate.deferred import Handle, handle_of, held_tensors, is_recording
from nucleate.deferred.active import wants_real
from nucleate.deferred.context import deferred_from
from nucleate.deferred.guards import guard
from nucleate.errors import name_list
from nucleate.materialize.execute import execute
from nucleate.materialize.plan import Holder, Plan

#: The recording of a constructor begins with the first tensor that has so many elements. Recording and making a tensor
#: takes 0.3 to 0.4 ms longer than eager torch, for every size. With two threads, models with weights of 4 million
#: elements gain more than that, and models with weights of 1 million elements do not; see the section "When deferring
#: pays" of docs/benchmarks.md.
ONSET_NUMEL = 2**21


@dataclass(frozen=True, slots=True)
class _Deferred:
    """A deferred tensor that is alive when a block ends.

    Attributes:
        tensor: The tensor.
        handle: The link to the tensor's recording.
        holders: The places in modules that hold the tensor, or the shelf if no module does.
    """

    tensor: Tensor
    handle: Handle
    holders: list[Holder]


class _Shelf(nn.Module):
    """A stand-in for a model that holds all tensors. It omits most modules: they may have meta tensors on purpose.

    Args:
        modules: The modules of a block. The shelf holds those that `execute` has to know.
        tensors: The deferred tensors.
    """

    def __init__(self, modules: Sequence[nn.Module], tensors: list[Tensor]) -> None:
        super().__init__()
        self.recurrent = nn.ModuleList(module for module in modules if isinstance(module, nn.RNNBase))
        self.tensors = tensors


class Block:
    """One block of construction.

    Args:
        device: The device for which tensors are constructed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._modules: list[nn.Module] = []
        self._tensors: list[Tensor] = []

    @contextmanager
    def construction(self) -> Iterator[None]:
        """Enter the block. After an error inside, tensors that are deferred by then stay deferred.

        An outer context that defers, or that makes real tensors, takes precedence. Construction for other devices than
        the CPU has not been measured and stays eager.
        """
        if self._device.type != "cpu" or is_recording() or wants_real():
            yield
            return
        with deferred_from(ONSET_NUMEL, self._device) as record:
            yield
            self._modules, self._tensors = record.survivors()

    def make(self) -> None:
        """Materialize all tensors that the block has deferred, also those that only a variable holds.

        Raises:
            DeferredEditError: A tensor was edited, and nothing recorded the edit.
        """
        if self._tensors:
            _guard_refused(self._make())

    def _make(self) -> list[tuple[weakref.ref[Tensor], Handle]]:
        """Materialize all deferred tensors, and return those that torch refused to swap."""
        shelf = _Shelf(self._modules, self._tensors)
        found = self._take(shelf)
        with torch._C.DisableTorchFunctionSubclass():
            gradients = [(each.tensor, each.tensor.grad) for each in found if each.tensor.is_leaf]
            for tensor, _ in gradients:
                tensor.grad = None
            # A view keeps its base alive, and a graph its inputs, until the view or the graph ends. So views and
            # results of graphs come first.
            first = [each for each in found if each.tensor._is_view() or not each.tensor.is_leaf]
        known = {id(each) for each in first}
        for part in filter(None, (first, [each for each in found if id(each) not in known])):
            plan = Plan.of_tensors((holder, each.tensor) for each in part for holder in each.holders)
            plan.release()
            execute(plan, shelf, self._device)
        for tensor, gradient in gradients:
            if gradient is not None and not tensor.is_meta:
                tensor.grad = gradient
        return [(weakref.ref(each.tensor), each.handle) for each in found if each.tensor.is_meta]

    def _take(self, shelf: nn.Module) -> list[_Deferred]:
        found = {id(t): _Deferred(t, handle, []) for t in self._tensors if (handle := handle_of(t)) is not None}
        barren = set[int]()
        for module in self._modules:
            for kind, name, tensor in held_tensors(module, barren):
                if id(tensor) in found:
                    each = found[id(tensor)]
                    each.holders.append(Holder(module, kind, name, each.handle.fqn))
        for each in found.values():
            if not each.holders:
                each.holders.append(Holder(shelf, "attribute", "tensors", each.handle.fqn))
        self._modules, self._tensors = [], []
        return list(found.values())


def _guard_refused(refused: Sequence[tuple[weakref.ref[Tensor], Handle]]) -> None:
    """Guard tensors that torch refused to swap and that are still alive. Modules hold new tensors in their place."""
    names = []
    for ref, handle in refused:
        tensor = ref()
        if tensor is not None:
            guard(tensor, handle.record, handle.fqn)
            if issubclass(handle.cls, nn.Parameter):
                names.append(handle.fqn)
    if names:
        warnings.warn(
            f"init_module replaced {name_list(names)} by new parameters: a weak reference or autograd kept torch from "
            "giving the old ones their values. Other objects that hold the old ones, such as an optimizer that was "
            "built inside the block, cannot train the model. Build them after the block, or pass empty_init=False.",
            stacklevel=4,
        )
