"""After a strategy has laid a model out, the core keeps ties, attributes and hooks, and makes the values once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from nucleate import Runtime, Strategy
from nucleate.errors import ConfigurationError
from nucleate.materialize import Plan


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.embed.weight.note = "kept"  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        del x
        return _whole(self.embed.weight).sum() + _whole(self.head.weight).sum()


def _whole(parameter: Any) -> Tensor:
    whole: Tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole


class Replacing(Strategy):
    """Puts DTensors in the place of all parameters, one for each name, as torch's own means do."""

    name = "replacing"
    distributed = True
    shards = True

    def __init__(self, fault: Callable[[nn.Module], None] | None = None) -> None:
        self.fault = fault
        self.steps: list[str] = []

    def module_init_context(self) -> AbstractContextManager[object]:
        return nullcontext()

    def check_model(self, model: nn.Module) -> None:
        assert all(parameter.is_meta for parameter in model.parameters())
        self.steps.append("check")

    def lay_out(self, model: nn.Module) -> None:
        self.steps.append("lay out")
        if self.fault is not None:
            self.fault(model)
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not isinstance(parameter, DTensor):
                    part = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
                    setattr(module, name, nn.Parameter(part, requires_grad=parameter.requires_grad))

    def enclose(self, model: nn.Module) -> nn.Module:
        assert not any(parameter.is_meta for parameter in model.parameters())
        self.steps.append("enclose")
        return model

    @contextmanager
    def step_context(self) -> Any:
        self.steps.append("step")
        yield

    def clip_gradients(self, parameters: Any, **limits: Any) -> Tensor | None:
        self.steps.append(f"clip {len(parameters)}")
        return super().clip_gradients(parameters, **limits)


def test_ties_attributes_and_hooks_of_replaced_parameters_are_kept() -> None:
    strategy = Replacing()
    runtime = Runtime(accelerator="cpu", strategy=strategy)
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        model = Net()
    seen: list[Tensor] = []
    model.embed.weight.register_post_accumulate_grad_hook(seen.append)
    wrapped = runtime.setup(model)
    assert strategy.steps == ["check", "lay out", "enclose"]
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.note == "kept"  # type: ignore[attr-defined]
    torch.manual_seed(0)
    assert torch.equal(_whole(model.head.weight), Net().head.weight)
    runtime.backward(wrapped(torch.tensor([1])).sum())
    assert len(seen) == 1
    assert strategy.steps == ["check", "lay out", "enclose", "step", "step"]


def test_a_tie_that_is_laid_out_in_two_ways_is_refused_by_name() -> None:
    def fault(model: Any) -> None:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        part = distribute_tensor(model.head.weight.detach(), mesh, [Shard(1)], src_data_rank=None)
        model.head.weight = nn.Parameter(part)

    runtime = Runtime(accelerator="cpu", strategy=Replacing(fault))
    with runtime.init_module(empty_init=True):
        model = Net()
    with pytest.raises(ConfigurationError, match=r"embed.weight, head.weight are tied"):
        runtime.setup(model)


def test_after_an_error_of_lay_out_the_model_is_deferred_as_before() -> None:
    def fault(model: nn.Module) -> None:
        raise ConfigurationError("not this one")

    runtime = Runtime(accelerator="cpu", strategy=Replacing(fault))
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        model = Net()
    with pytest.raises(ConfigurationError, match="not this one"):
        runtime.setup(model)
    assert "deferred" in repr(model.head.weight)
    again = Runtime(accelerator="cpu", strategy="single_device").setup(model)
    torch.manual_seed(0)
    assert torch.equal(_whole(again.head.weight), Net().head.weight)


@pytest.mark.parametrize("strategy", ["single_device", Replacing()], ids=["ours", "replacing"])
def test_a_verified_setup_makes_one_plan(strategy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plan_of = Plan.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(Plan, "of", classmethod(lambda cls, model: made.append(1) or plan_of(cls, model)))
    runtime = Runtime(accelerator="cpu", strategy=strategy, verify=True)
    with runtime.init_module(empty_init=True):
        model = Net()
    runtime.setup(model)
    assert len(made) == 1


def test_the_plan_follows_what_the_precision_changes() -> None:
    runtime = Runtime(accelerator="cpu", strategy="single_device", precision="bf16-true", verify=True)
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        model = nn.Linear(4, 4, dtype=torch.float32)
    wrapped = runtime.setup(model)
    torch.manual_seed(0)
    assert torch.equal(wrapped.weight, nn.Linear(4, 4).weight.to(torch.bfloat16))


def test_clipping_goes_through_the_strategy() -> None:
    strategy = Replacing()
    runtime = Runtime(accelerator="cpu", strategy=strategy)
    with runtime.init_module(empty_init=True):
        model = Net()
    wrapped, optimizer = runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    runtime.backward(wrapped(torch.tensor([1])).sum())
    norm = runtime.clip_gradients(wrapped, optimizer, max_norm=1.0)
    assert norm is not None
    assert strategy.steps[-1] == "clip 1"


def test_a_strategy_with_a_setup_of_its_own_is_called_by_it() -> None:
    class Own(Replacing):
        def setup(self, model: nn.Module) -> nn.Module:
            self.steps.append("own")
            return super().setup(model)

    strategy = Own()
    runtime = Runtime(accelerator="cpu", strategy=strategy)
    with runtime.init_module(empty_init=True):
        model = Net()
    runtime.setup(model)
    assert strategy.steps == ["own", "check", "lay out", "enclose"]
