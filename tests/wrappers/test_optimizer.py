"""The optimizer's wrapper: an optimizer to everybody who asks, and the precision in between."""

import copy
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from nucleate.errors import UsageError
from nucleate.precision import FullPrecision, MixedPrecision
from nucleate.strategies import SingleDeviceStrategy
from nucleate.wrappers import OptimizerWrapper
from nucleate.wrappers.optimizer import RuntimeLinks
from tests.device import ACCELERATOR

pytestmark = pytest.mark.usefixtures("factories_on_device")


def wrapped(**options: Any) -> OptimizerWrapper:
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    return OptimizerWrapper(torch.optim.AdamW(model.parameters(), **{"lr": 0.1, **options}), FullPrecision())


def test_groups_state_and_defaults_are_the_optimizers_own() -> None:
    wrapper = wrapped()
    assert isinstance(wrapper, Optimizer)
    assert wrapper.param_groups is wrapper.optimizer.param_groups
    wrapper.step()
    assert wrapper.state is wrapper.optimizer.state
    assert len(wrapper.state) == 2
    assert wrapper.defaults["lr"] == 0.1
    wrapper.zero_grad()
    assert all(parameter.grad is None for parameter in wrapper.param_groups[0]["params"])
    wrapper.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert len(wrapper.optimizer.param_groups) == 2


def test_the_step_goes_through_the_precision_also_with_a_closure() -> None:
    class Recording:
        asked: ClassVar[list[Any]] = []

        def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> str:
            self.asked.append((optimizer, closure))
            return "result"

    wrapper = wrapped()
    wrapper.precision = Recording()  # type: ignore[assignment]

    def closure() -> float:
        return 0.0

    assert wrapper.step(closure) == "result"
    assert Recording.asked == [(wrapper.optimizer, closure)]


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10),
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer), lr_scheduler.CosineAnnealingLR(optimizer, 5)],
            milestones=[2],
        ),
        lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
    ],
)
def test_schedulers_set_the_rate_of_the_real_optimizer(make: Callable[[Optimizer], Any]) -> None:
    wrapper, plain = wrapped(), wrapped().optimizer
    rates = []
    for optimizer in (wrapper, plain):
        scheduler = make(optimizer)
        rates.append([])
        for _ in range(4):
            optimizer.step()
            scheduler.step()
            rates[-1].append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1]
    assert wrapper.optimizer.param_groups[0]["lr"] == rates[0][-1]


def test_a_plateau_scheduler_takes_it() -> None:
    wrapper = wrapped()
    scheduler = lr_scheduler.ReduceLROnPlateau(wrapper, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    assert wrapper.param_groups[0]["lr"] < 0.1


def test_hooks_run_around_the_real_step() -> None:
    wrapper, seen = wrapped(), []
    wrapper.register_step_post_hook(lambda optimizer, args, kwargs: seen.append(optimizer))
    wrapper.step()
    assert seen == [wrapper.optimizer]


def test_state_is_saved_and_loaded() -> None:
    wrapper, other = wrapped(), wrapped(lr=0.5)
    wrapper.step()
    other.load_state_dict(wrapper.state_dict())
    assert other.param_groups[0]["lr"] == 0.1
    assert other.optimizer.state_dict()["state"][0]["step"] == 1


def test_it_pickles_and_copies_also_under_a_scheduler() -> None:
    wrapper = wrapped()
    lr_scheduler.StepLR(wrapper, 1)
    for clone in (pickle.loads(pickle.dumps(wrapper)), copy.deepcopy(wrapper)):
        assert type(clone.optimizer) is torch.optim.AdamW
        assert clone.param_groups is clone.optimizer.param_groups
        clone.step()


def test_an_overflow_skips_the_step_of_the_wrapper() -> None:
    model = nn.Linear(2, 2)
    precision = MixedPrecision(torch.float16, device_type=ACCELERATOR)
    wrapper = OptimizerWrapper(torch.optim.SGD(model.parameters(), lr=1.0), precision)
    before = model.weight.clone()
    precision.scale(model(torch.ones(1, 2)).sum() * float("inf")).backward()
    assert wrapper.step() is None
    assert torch.equal(model.weight, before)


# -- the user's class ----------------------------------------------------------------------------------------


def test_it_is_an_instance_of_the_users_class_and_of_its_own() -> None:
    wrapper = wrapped()
    assert isinstance(wrapper, torch.optim.AdamW)
    assert isinstance(wrapper, torch.optim.Adam), "AdamW derives from Adam"
    assert isinstance(wrapper, OptimizerWrapper)
    assert isinstance(wrapper, Optimizer)
    assert not isinstance(wrapper, torch.optim.SGD)
    assert type(wrapper) is OptimizerWrapper
    assert repr(wrapper).startswith("OptimizerWrapper(AdamW (")
    clone = pickle.loads(pickle.dumps(wrapper))
    assert isinstance(clone, torch.optim.AdamW)
    assert type(clone) is OptimizerWrapper


class WithMethods(torch.optim.SGD):
    """Keeps an attribute of its own that its method writes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


def test_methods_and_attributes_of_the_users_class_are_the_optimizers_own() -> None:
    inner = WithMethods([nn.Parameter(torch.ones(1))], lr=0.1)
    wrapper = OptimizerWrapper(inner, FullPrecision())
    wrapper.eval()
    assert wrapper.mode == inner.mode == "eval"
    wrapper.mode = "train"
    assert inner.mode == "train"
    del wrapper.mode
    assert not hasattr(inner, "mode")
    assert not hasattr(wrapper, "mode")


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_scaler_of_the_user_unscales_the_real_optimizer(fused: bool) -> None:
    # torch's scaler gives a fused optimizer the scale as an attribute.
    results = []
    for wrap in (False, True):
        parameter = nn.Parameter(torch.ones(2))
        optimizer: Optimizer = torch.optim.Adam([parameter], lr=0.1, eps=1.0, fused=fused)
        if wrap:
            optimizer = OptimizerWrapper(optimizer, FullPrecision())
        scaler = torch.amp.GradScaler(ACCELERATOR, init_scale=1024.0)
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(parameter.square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(parameter.detach())
        assert not hasattr(optimizer, "grad_scale")
    assert torch.equal(*results)


def test_a_deep_copy_keeps_precision_and_strategy_but_copies_the_optimizer() -> None:
    inner = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    precision, strategy = FullPrecision(), SingleDeviceStrategy()
    wrapper = OptimizerWrapper(inner, precision, strategy)
    for clone, same in ((copy.deepcopy(wrapper), False), (copy.copy(wrapper), True)):
        assert clone.precision is precision
        assert clone.strategy is strategy
        assert (clone.optimizer is inner) is same
    first, second = copy.deepcopy([wrapper, wrapper])
    assert first is second
    assert pickle.loads(pickle.dumps(wrapper)).strategy is None


# -- parameters ----------------------------------------------------------------------------------------------


def test_every_way_to_add_parameters_is_checked_before_the_optimizer_changes() -> None:
    seen = []

    def check(optimizer: Optimizer, parameters: Any) -> list[Tensor]:
        seen.append(list(parameters))
        raise UsageError("refused")

    inner = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    wrapper = OptimizerWrapper(inner, FullPrecision(), links=RuntimeLinks(check=check))
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    ways: list[Any] = [first, [first, second], iter([first, second]), [("a", first)]]
    for way in ways:
        with pytest.raises(UsageError, match="refused"):
            wrapper.add_param_group({"params": way})
    assert [len(parameters) for parameters in seen] == [1, 2, 2, 1]
    assert all(parameters[0] is first for parameters in seen)
    assert len(inner.param_groups) == 1


@pytest.mark.parametrize("wrong", [None, {"lr": 0.1}, {"params": {nn.Parameter(torch.ones(1))}}, {"params": [1]}])
def test_a_group_that_torch_refuses_is_refused_by_torch(wrong: Any) -> None:
    wrapper = wrapped()
    with pytest.raises((TypeError, KeyError)):
        wrapper.add_param_group(wrong)
    assert len(wrapper.param_groups) == 1
