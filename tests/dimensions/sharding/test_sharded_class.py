"""Modules whose first base has no instance dictionary, such as `abc.ABC`, can be sharded as any other."""

from __future__ import annotations

import abc
from typing import Generic, Protocol, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fully_shard import get_cls_to_fsdp_cls

from nucleate import Runtime
from nucleate.dimensions.sharding.sharded_class import make_shardable
from tests.device import ACCELERATOR

pytestmark = pytest.mark.usefixtures("factories_on_device")

T = TypeVar("T")


class Body(nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.linear = nn.Linear(4, 4)
        self.names = ["cuts"]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def _apply(self, fn: object, recurse: bool = True) -> nn.Module:
        self.names.append("applied")
        return super()._apply(fn, recurse)


class Interface(abc.ABC, nn.Module):
    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...


class Named(Protocol):
    names: list[str]


class Slotted:
    __slots__ = ()


class Abstract(Interface, Body):
    def forward(self, x: Tensor) -> Tensor:
        return Body.forward(self, x)


class Parametric(Generic[T], Body): ...


class Structural(Named, Body): ...


class WithSlots(Slotted, Body): ...


class Mixin: ...


class Mixed(Mixin, Body): ...


UNASSIGNABLE = [Abstract, Parametric, Structural, WithSlots]


@pytest.mark.parametrize("cls", [*UNASSIGNABLE, Mixed])
def test_a_sharded_model_of_any_base_is_exact_and_trains(cls: type[Body]) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="fsdp")
    torch.manual_seed(0)
    expected = cls()
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        original = cls()
    model, optimizer = runtime.setup(original, torch.optim.SGD(original.parameters(), lr=0.5))
    assert isinstance(original, FSDPModule)
    assert isinstance(original, cls)
    assert torch.equal(original.linear.weight.full_tensor(), expected.linear.weight)
    runtime.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    expected(torch.ones(2, 4)).sum().backward()
    assert torch.equal(original.linear.weight.full_tensor(), expected.linear.weight - 0.5 * expected.linear.weight.grad)


@pytest.mark.parametrize("cls", UNASSIGNABLE)
def test_torch_cannot_assign_its_own_class_and_names_are_looked_up_in_its_order(cls: type[Body]) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="fsdp")
    runtime.launch()
    get_cls_to_fsdp_cls().pop(cls, None)
    with pytest.raises(TypeError, match="object layout differs"):
        fully_shard(cls(), mesh=runtime.strategy.device_mesh)
    refused = get_cls_to_fsdp_cls()[cls]
    module = cls()
    make_shardable(module)
    fully_shard(module, mesh=runtime.strategy.device_mesh)
    assert type(module).__name__ == refused.__name__
    assert type(module).__mro__[1:] == refused.__mro__[1:]
    module.double()
    assert module.names == ["cuts", "applied"]
    # One class for all modules of a class.
    assert get_cls_to_fsdp_cls()[cls] is type(module)
    make_shardable(cls())
    assert get_cls_to_fsdp_cls()[cls] is type(module)


def test_where_torch_can_assign_its_own_class_nothing_is_registered() -> None:
    for module in (Mixed(), nn.Linear(2, 2), nn.ModuleList()):
        get_cls_to_fsdp_cls().pop(type(module), None)
        make_shardable(module)
        assert type(module) not in get_cls_to_fsdp_cls()
