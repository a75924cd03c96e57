"""The parameters from before a setup: who is pointed to the new ones, who is marked, and what is kept alive."""

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nucleate import Precision, Runtime, Strategy
from nucleate.errors import ConfigurationError, UsageError
from nucleate.wrappers.replaced import replaced_fqn
from tests.device import ACCELERATOR

pytestmark = pytest.mark.usefixtures("factories_on_device")


class Replacing(Strategy):
    """Puts a new parameter in the place of each real one."""

    name = "replacing"
    shards = True

    def __init__(self, on_replaced: Callable[[], None] = lambda: None) -> None:
        self._on_replaced = on_replaced

    def module_init_context(self) -> AbstractContextManager[object]:
        return nullcontext()

    def lay_out(self, model: nn.Module) -> None:
        new: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, old in module._parameters.items():
                if old is not None:
                    new.setdefault(id(old), nn.Parameter(old.detach().clone(), old.requires_grad))
                    module._parameters[name] = new[id(old)]
        del old
        self._on_replaced()


class Freezing(Precision):
    """Replaces the weights of linear layers by integers."""

    name = "freezing"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def module_init_context(self) -> AbstractContextManager[object]:
        return nullcontext()

    def setup(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.detach().to(torch.int8), requires_grad=False)
        return model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight = self.body.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


def start(strategy: Any, empty_init: bool) -> tuple[Runtime, Net]:
    runtime = Runtime(accelerator=ACCELERATOR, strategy=strategy)
    with runtime.init_module(empty_init=empty_init):
        model = Net()
    return runtime, model


@pytest.mark.parametrize("empty_init", [True, False])
def test_an_optimizer_that_setup_did_not_get_fails_by_name(empty_init: bool) -> None:
    runtime, model = start("fsdp", empty_init)
    optimizer = torch.optim.AdamW(model.parameters())
    wrapped = runtime.setup(model)
    runtime.backward(wrapped(torch.ones(1, 3)).sum())
    for use in (optimizer.zero_grad, optimizer.step):
        with pytest.raises(UsageError, match=r"former parameter body\.weight, which `setup` has replaced"):
            use()
    with pytest.raises(UsageError, match=r"AdamW has parameters .* body\.weight, body\.bias, norm\.weight, norm\.bias"):
        runtime.setup_optimizers(optimizer)
    with pytest.raises(UsageError, match=r"SGD has parameters that `setup` has replaced in their model: body\.weight"):
        runtime.setup(nn.Linear(2, 2), torch.optim.SGD(optimizer.param_groups[0]["params"], lr=0.1))


@pytest.mark.parametrize(("strategy", "empty_init"), [("fsdp", True), ("fsdp", False), (Replacing, False)])
def test_an_optimizer_that_setup_got_has_the_new_parameters(strategy: Any, empty_init: bool) -> None:
    runtime, model = start(strategy if strategy == "fsdp" else strategy(), empty_init)
    old = list(model.parameters())
    wrapped, optimizer = runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in wrapped.parameters()]
    assert [replaced_fqn(p) for p in old] == ["body.weight", "body.bias", "norm.weight", "norm.bias"]
    assert [replaced_fqn(p) for p in wrapped.parameters()] == [None] * 4
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    runtime.backward(wrapped(torch.ones(1, 3)).square().sum())
    optimizer.step()
    assert not torch.equal(wrapped.body.weight.detach(), before)


@pytest.mark.parametrize("empty_init", [True, False])
@pytest.mark.parametrize("how", ["list", "iterator", "one", "named"])
def test_adding_replaced_parameters_to_an_optimizer_is_refused_before_it_changes(empty_init: bool, how: str) -> None:
    runtime, model = start("fsdp", empty_init)
    old = list(model.norm.parameters())
    named = list(model.norm.named_parameters())
    wrapped, optimizer = runtime.setup(model, torch.optim.SGD(model.body.parameters(), lr=0.1))
    added: Any = {"list": old, "iterator": iter(old), "one": old[0], "named": named}[how]
    with pytest.raises(UsageError, match=r"SGD has parameters .* norm\.weight.*Pass the optimizer to `setup`"):
        optimizer.add_param_group({"params": added})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": wrapped.norm.parameters(), "lr": 0.5})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]
    # An optimizer without a wrapper fails at its next use.
    optimizer.optimizer.add_param_group({"params": old})
    with pytest.raises(UsageError, match=r"former parameter norm\.weight"):
        optimizer.zero_grad()


def test_a_model_that_shares_replaced_parameters_is_refused_by_name() -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="fsdp")
    with runtime.init_module():
        first, second = Net(), Net()
        second.norm.weight, second.norm.bias = first.norm.weight, first.norm.bias
    runtime.setup(first)
    with pytest.raises(
        UsageError, match=r"Net shares parameters .* replaced them: norm\.weight, norm\.bias\. Put both"
    ):
        runtime.setup(second)


@pytest.mark.parametrize("empty_init", [True, False])
def test_parameters_that_a_precision_freezes_are_refused_before_anything_is_made(empty_init: bool) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, precision=Freezing())
    with runtime.init_module(empty_init=empty_init):
        model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    old = model[0].weight
    with pytest.raises(ConfigurationError, match=r"SGD has 0\.weight, which the precision has quantized"):
        runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert ("deferred" in repr(model[0].bias)) == empty_init
    early = torch.optim.SGD([old], lr=0.1)
    wrapped, optimizer = runtime.setup(model, torch.optim.SGD([*model[1].parameters(), model[0].bias], lr=0.1))
    assert optimizer.param_groups[0]["params"][2] is wrapped.module[0].bias
    del early


@pytest.mark.parametrize("empty_init", [True, False])
def test_a_parameter_that_a_precision_replaced_fails_by_name(empty_init: bool) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, precision=Freezing())
    with runtime.init_module(empty_init=empty_init):
        model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    runtime.setup(model)
    with pytest.raises(UsageError, match=r"former parameter 0\.weight"):
        optimizer.zero_grad()


@pytest.mark.parametrize("holds", ["nobody", "optimizer"])
def test_a_real_parameter_is_freed_when_it_is_replaced_if_nobody_else_has_it(holds: str) -> None:
    model, dead = Net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if holds == "optimizer" else None
    alive = [weakref.ref(p) for p in model.parameters()]

    def count() -> None:
        gc.collect()
        dead.append(sum(reference() is None for reference in alive))

    runtime = Runtime(accelerator=ACCELERATOR, strategy=Replacing(count))
    runtime.setup(model)
    assert dead == [0 if optimizer else 4]
