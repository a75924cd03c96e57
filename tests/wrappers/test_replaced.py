"""Replaced parameters: their gradient is refused by name, and everything else works as with any parameter."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.errors import UsageError
from nucleate.wrappers.replaced import mark_replaced, refuse_replaced, replaced_fqn
from tests.device import ACCELERATOR

pytestmark = pytest.mark.usefixtures("factories_on_device")

ERROR = (
    r"former parameter body\.weight, which `setup` has replaced.*Pass the optimizer to `setup`.*or build it afterwards"
)


def replaced(device: str | None = None) -> nn.Parameter:
    parameter = nn.Parameter(torch.arange(6.0, device=device).view(3, 2))
    mark_replaced(parameter, "body.weight")
    return parameter


def optimizers() -> list[Callable[[list[Tensor]], torch.optim.Optimizer]]:
    found = [cls for cls in vars(torch.optim).values() if isinstance(cls, type)]
    return [cls for cls in found if issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer]


class ThirdParty(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= parameter.grad


@pytest.mark.parametrize("cls", [*optimizers(), ThirdParty], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("device", [None, "meta"])
def test_every_optimizer_fails_by_name_at_its_first_step_and_at_zero_grad(cls: Any, device: str | None) -> None:
    optimizer = cls([replaced(device)])
    with pytest.raises(UsageError, match=ERROR):
        optimizer.step(lambda: torch.zeros(()))
    with pytest.raises(UsageError, match=ERROR):
        optimizer.zero_grad()


def test_clipping_and_unscaling_fail_too() -> None:
    with pytest.raises(UsageError, match=ERROR):
        nn.utils.clip_grad_norm_([replaced()], 1.0)
    scaler = torch.amp.GradScaler(ACCELERATOR)
    scaler.scale(torch.ones(()))
    with pytest.raises(UsageError, match=ERROR):
        scaler.unscale_(torch.optim.SGD([replaced()], lr=0.1))


def test_a_gradient_cannot_be_set_or_deleted() -> None:
    parameter = replaced()
    with pytest.raises(UsageError, match=ERROR):
        parameter.grad = torch.ones(3, 2)
    with pytest.raises(UsageError, match=ERROR):
        del parameter.grad


def test_everything_else_works_as_before() -> None:
    plain, parameter = nn.Parameter(torch.arange(6.0).view(3, 2)), replaced()
    before = hash(parameter)
    mark_replaced(plain, "again")
    plain = nn.Parameter(torch.arange(6.0).view(3, 2))
    assert hash(parameter) == before
    assert isinstance(parameter, nn.Parameter)
    assert torch.equal(parameter, plain)
    assert type(parameter.data) is type(parameter.detach()) is type(parameter.clone()) is type(parameter * 2) is Tensor
    assert (parameter.shape, parameter.requires_grad, parameter.is_leaf) == (plain.shape, True, True)
    assert "5." in repr(parameter)
    assert repr(parameter).startswith("Parameter containing:\n")
    assert "meta" in repr(replaced("meta"))
    (gradient,) = torch.autograd.grad(parameter.sum(), parameter)
    assert torch.equal(gradient, torch.ones(3, 2))
    with torch.no_grad():
        parameter.add_(1)
    assert parameter[0, 0] == 1


def test_an_optimizers_state_dict_is_as_before() -> None:
    state = torch.optim.AdamW([replaced()], lr=0.5).state_dict()
    assert state["param_groups"][0]["lr"] == 0.5
    assert state["param_groups"][0]["params"] == [0]


def test_a_deep_copy_is_replaced_too() -> None:
    parameter = replaced()
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    first, second = copy.deepcopy([parameter, parameter])
    assert first is second is not parameter
    assert replaced_fqn(first) == "body.weight"
    assert torch.equal(first, parameter)
    with pytest.raises(UsageError, match=ERROR):
        copy.deepcopy(optimizer).step()
    with pytest.raises(UsageError, match=ERROR):
        parameter.grad  # noqa: B018


def through_pickle(parameter: nn.Parameter) -> Any:
    return pickle.loads(pickle.dumps(parameter))


def through_torch_file(parameter: nn.Parameter) -> Any:
    file = io.BytesIO()
    torch.save(parameter, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("make", [through_pickle, through_torch_file, copy.copy, nn.Parameter])
@pytest.mark.parametrize("tag", [None, "mine"])
def test_what_is_made_from_it_is_a_new_plain_parameter(make: Callable[[nn.Parameter], Any], tag: str | None) -> None:
    parameter = replaced()
    if tag is not None:
        parameter.tag = tag
    made = make(parameter)
    assert type(made) is nn.Parameter
    assert made.grad is None
    assert torch.equal(made, parameter)
    assert not [name for name in vars(made) if name.startswith("_nucleate")]
    assert replaced_fqn(made) is None
    assert replaced_fqn(parameter) == "body.weight"
    if make is not nn.Parameter:
        assert getattr(made, "tag", None) == tag
    made.sum().backward()
    torch.optim.SGD([made], lr=1.0).step()


def test_several_are_refused_together() -> None:
    other = nn.Parameter(torch.ones(1))
    mark_replaced(other, "head.bias")
    refuse_replaced("SGD", [nn.Parameter(torch.ones(1)), torch.ones(1), "something else"])
    with pytest.raises(UsageError, match=r"SGD has parameters .* body\.weight, head\.bias\. They get no gradient"):
        refuse_replaced("SGD", [replaced(), nn.Parameter(torch.ones(1)), other])


def test_a_class_that_cannot_be_changed_stays_as_it_is() -> None:
    class Slotted(Tensor):
        __slots__ = ("more",)

    class Other(Slotted):
        __slots__ = ("even_more",)

    parameter = torch.ones(2).as_subclass(Other)
    mark_replaced(parameter, "weight")
    assert parameter.sum() == 2


@pytest.mark.parametrize("empty_init", [True, False])
def test_parameters_that_setup_keeps_have_gradients_as_before(empty_init: bool) -> None:
    runtime = Runtime(accelerator=ACCELERATOR)
    with runtime.init_module(empty_init=empty_init):
        model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = runtime.setup(model)
    before = wrapped.weight.detach().clone()
    runtime.backward(wrapped(torch.ones(1, 2)).sum())
    optimizer.step()
    assert not torch.equal(wrapped.weight, before)
    assert type(wrapped.weight) is nn.Parameter
