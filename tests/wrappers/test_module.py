"""The model's wrapper: the user's model in all but forward."""

import copy
import io
import pickle
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nucleate.errors import UsageError
from nucleate.precision import FullPrecision, HalfPrecision, MixedPrecision, Precision
from nucleate.strategies.base import Strategy
from nucleate.wrappers import ModuleWrapper
from nucleate.wrappers.scaled_backward import backward_allowed
from tests.device import ACCELERATOR

pytestmark = pytest.mark.usefixtures("factories_on_device")


class FakeStrategy(Strategy):
    """Wraps the model or not, and guards its methods or not."""

    name = "fake"

    def __init__(self, guards: bool = False) -> None:
        self.guards = guards
        self.marked: list[str] = []

    def module_init_context(self) -> AbstractContextManager[object]:
        return nullcontext()

    def setup(self, model: nn.Module) -> nn.Module:
        return model

    def mark_forward_method(self, module: nn.Module, name: str) -> None:
        self.marked.append(name)

    def guards_methods(self, module: nn.Module) -> bool:
        return self.guards


class Outer(nn.Module):
    """What DDP is to a model: it must be entered by its own forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.entered = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.entered += 1
        return self.module(*args, **kwargs)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("table", torch.zeros(1), persistent=False)
        self.number = 3
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.seen.append(x.dtype)
        out: Tensor = self.layer(x) * scale
        return out

    def loss(self, x: Tensor) -> Tensor:
        return self(x).sum()

    def direct(self, x: Tensor) -> Tensor:
        self.seen.append(x.dtype)
        return self.layer.weight.sum() * x.sum()

    def harmful(self, x: Tensor) -> Tensor:
        self.number = -1
        return self.layer(x)

    @torch.no_grad()
    def generate(self, x: Tensor) -> Tensor:
        out: Tensor = self(x)
        return out

    def fail(self) -> None:
        raise ZeroDivisionError

    def get_extra_state(self) -> dict[str, int]:
        return {"number": self.number}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.number = state["number"]

    @property
    def twice(self) -> int:
        return 2 * self.number

    def train(self, mode: bool = True) -> "Model":
        super().train(mode)
        self.trained = mode
        return self


def wrap(precision: Precision | None = None, outer: bool = False, guards: bool = False) -> ModuleWrapper:
    model = Model()
    forward_module = Outer(model) if outer else model
    return ModuleWrapper(forward_module, model, precision or FullPrecision(), FakeStrategy(guards))


def ones() -> Tensor:
    return torch.ones(1, 2)


@contextmanager
def no_hooks_left() -> Iterator[None]:
    hooks = torch.nn.modules.module._global_forward_pre_hooks
    assert not hooks
    yield
    assert not hooks


@pytest.mark.parametrize("outer", [False, True])
def test_forward_is_converted_and_entered_where_the_strategy_says(outer: bool) -> None:
    wrapper = wrap(HalfPrecision(), outer)
    wrapper.module.to(torch.bfloat16)
    output = wrapper(ones(), scale=2.0)
    assert wrapper.module.seen == [torch.bfloat16]
    assert output.dtype == torch.float32
    if outer:
        assert wrapper.forward_module.entered == 1


@pytest.mark.parametrize("outer", [False, True])
def test_keys_and_modules_are_the_models_own(outer: bool) -> None:
    wrapper = wrap(outer=outer)
    model = wrapper.module
    assert list(wrapper.state_dict()) == ["_extra_state", "layer.weight", "layer.bias"]
    assert dict(wrapper.named_parameters()) == dict(model.named_parameters())
    assert [name for name, _ in wrapper.named_buffers()] == ["table"]
    assert next(iter(wrapper.modules())) is model
    assert [name for name, _ in wrapper.named_children()] == ["layer"]
    assert wrapper.get_submodule("layer") is model.layer
    other = wrap(outer=outer)
    assert not wrapper.load_state_dict(other.state_dict()).missing_keys
    assert torch.equal(wrapper.layer.weight, other.layer.weight)


def test_a_wrapper_inside_another_module_is_saved_and_loaded_without_a_prefix_of_its_own() -> None:
    parent, other = nn.Module(), nn.Module()
    parent.child, other.child = wrap(outer=True), wrap(outer=True)
    assert list(parent.state_dict()) == ["child._extra_state", "child.layer.weight", "child.layer.bias"]
    other.child.number = 11
    parent.load_state_dict(other.state_dict())
    assert parent.child.module.number == 11
    assert torch.equal(parent.child.layer.weight, other.child.layer.weight)


def test_attributes_are_read_set_and_deleted_on_the_model() -> None:
    wrapper = wrap()
    assert wrapper.number == 3
    assert wrapper.twice == 6
    wrapper.number = 5
    wrapper.fresh = 1
    wrapper.layer = nn.Linear(2, 3)
    wrapper.extra = nn.Parameter(torch.ones(1))
    assert (wrapper.module.number, wrapper.module.fresh, wrapper.module.layer.out_features) == (5, 1, 3)
    assert "extra" in dict(wrapper.module.named_parameters())
    assert wrapper.extra is wrapper.module.extra
    del wrapper.fresh
    del wrapper.extra
    assert not hasattr(wrapper, "fresh")
    assert not hasattr(wrapper.module, "extra")
    with pytest.raises(AttributeError, match="'Model' object has no attribute 'nothing'"):
        _ = wrapper.nothing
    assert "number" in dir(wrapper)


def test_the_models_own_versions_of_module_methods_are_called_and_return_the_wrapper() -> None:
    wrapper = wrap()
    assert wrapper.eval() is wrapper
    assert wrapper.module.trained is False
    assert not wrapper.training
    assert not wrapper.layer.training
    assert wrapper.train() is wrapper
    assert wrapper.training
    assert wrapper.to(torch.float64) is wrapper
    assert wrapper.layer.weight.dtype == torch.float64
    assert not wrapper.requires_grad_(False).layer.weight.requires_grad
    applied: list[nn.Module] = []
    wrapper.apply(applied.append)
    assert wrapper.module in applied
    assert wrapper not in applied


def test_hooks_on_the_wrapper_surround_its_forward() -> None:
    wrapper, seen = wrap(), []
    with wrapper.register_forward_hook(lambda module, args, output: seen.append(module)):
        wrapper(ones())
    assert seen == [wrapper]


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("name", ["loss", "direct"])
def test_a_marked_method_goes_through_precision_and_strategy(outer: bool, name: str) -> None:
    wrapper = wrap(FullPrecision(torch.float64), outer, guards=True)
    wrapper.module.double()
    wrapper.mark_forward_method(name)
    assert wrapper._strategy.marked == [name]
    with no_hooks_left():
        getattr(wrapper, name)(ones()).backward()
    assert wrapper.module.seen == [torch.float64]
    assert "forward" not in wrapper.module.__dict__
    if outer:
        assert wrapper.forward_module.entered == 1
    wrapper(ones())  # forward is forward again
    assert wrapper.module.seen == [torch.float64] * 2


def test_forward_is_restored_when_a_marked_method_fails() -> None:
    wrapper = wrap(outer=True)
    wrapper.mark_forward_method(wrapper.module.fail)
    with pytest.raises(ZeroDivisionError):
        wrapper.fail()
    assert "forward" not in wrapper.module.__dict__
    own = wrapper.module.__dict__["forward"] = lambda x: x * 7
    with pytest.raises(ZeroDivisionError):
        wrapper.fail()
    assert wrapper.module.__dict__["forward"] is own


def test_only_methods_can_be_marked() -> None:
    for name, message in (("forward", "always a forward method"), ("number", "no method"), ("nothing", "no method")):
        with pytest.raises(UsageError, match=message):
            wrap().mark_forward_method(name)


def test_an_unmarked_method_that_calls_forward_is_refused_before_it_runs() -> None:
    wrapper = wrap(outer=True, guards=True)
    with no_hooks_left():
        with pytest.raises(UsageError, match=r"Model.loss\(\) calls forward .*'fake'.*mark_forward_method\('loss'\)"):
            wrapper.loss(ones())
        assert wrapper.module.seen == []
        with pytest.raises(UsageError, match="mark_forward_method"):
            wrapper.harmful(ones())
        with pytest.raises(ZeroDivisionError):
            wrapper.fail()


def test_methods_without_forward_or_without_gradients_are_free() -> None:
    wrapper = wrap(outer=True, guards=True)
    wrapper.direct(ones())
    wrapper.generate(ones())
    with torch.no_grad():
        wrapper.loss(ones())
    with torch.inference_mode():
        wrapper.loss(ones())
    assert wrapper.twice == 6
    assert wrap(outer=True).loss(ones()).requires_grad  # a strategy that does not guard


def test_other_models_and_the_wrapper_itself_may_be_called_in_an_unmarked_method() -> None:
    wrapper, other = wrap(outer=True, guards=True), nn.Linear(2, 2)

    def with_callback(self: Model, call: Any) -> Any:
        return call(ones())

    wrapper.module.with_callback = with_callback.__get__(wrapper.module)
    wrapper.with_callback(other)
    wrapper.with_callback(wrapper)
    with pytest.raises(UsageError, match="with_callback"):
        wrapper.with_callback(wrapper.module)


def test_plain_backward_is_refused_before_any_gradient_changes_where_gradients_are_scaled() -> None:
    wrapper = wrap(MixedPrecision(torch.float16, device_type=ACCELERATOR))
    loss = wrapper(ones()).sum() + wrapper.module.layer.weight.sum()
    with pytest.raises(UsageError, match=r"Call runtime.backward\(loss\). No gradient was changed."):
        loss.backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in wrapper.parameters())
    with backward_allowed():
        loss.backward()
    assert wrapper.layer.weight.grad is not None
    with torch.no_grad():
        wrapper(ones())


def test_a_parameter_that_forward_hands_out_keeps_no_hook() -> None:
    wrapper = wrap(MixedPrecision(torch.float16, device_type=ACCELERATOR))
    wrapper.module.forward = lambda x: (x, wrapper.module.layer.weight)  # type: ignore[method-assign]
    wrapper(ones())
    wrapper.layer.weight.sum().backward()


def test_plain_backward_is_fine_where_nothing_is_scaled() -> None:
    wrapper = wrap(MixedPrecision(device_type=ACCELERATOR))
    wrapper(ones()).sum().backward()
    assert wrapper.layer.weight.grad is not None


@pytest.mark.parametrize("outer", [False, True])
def test_it_pickles(outer: bool) -> None:
    wrapper = wrap(MixedPrecision(torch.float16, device_type=ACCELERATOR), outer)
    wrapper.mark_forward_method("loss")
    file = io.BytesIO()
    torch.save(wrapper, file)
    file.seek(0)
    for clone in (pickle.loads(pickle.dumps(wrapper)), torch.load(file, weights_only=False)):
        assert torch.equal(clone(ones()), wrapper(ones()))
        assert clone.module is not wrapper.module
        assert list(clone.state_dict()) == list(wrapper.state_dict())
        assert clone.layer is clone.module.layer
        assert clone.loss(ones()).item() == wrapper.loss(ones()).item()
        clone.extra = nn.Parameter(torch.ones(1))
        assert "extra" in dict(clone.module.named_parameters())


def test_a_copy_has_weights_of_its_own_and_the_same_plugins() -> None:
    wrapper = wrap(outer=True)
    clone = copy.deepcopy(wrapper)
    assert torch.equal(clone(ones()), wrapper(ones()))
    assert clone.forward_module.module is clone.module
    assert clone.layer.weight is not wrapper.layer.weight
    assert clone._precision is wrapper._precision
    assert clone._strategy is wrapper._strategy


class Explaining(Precision):
    """Explains errors by their messages."""

    name = "explaining"
    dtype = torch.float32
    explained: Exception | None = None

    def module_init_context(self) -> AbstractContextManager[object]:
        return nullcontext()

    def setup(self, model: nn.Module) -> nn.Module:
        return model

    def explain(self, error: Exception, model: nn.Module) -> Exception | None:
        self.asked = (error, model)
        return self.explained


@pytest.mark.parametrize("outer", [False, True])
def test_the_precision_may_explain_an_error_of_forward(outer: bool) -> None:
    precision = Explaining()
    wrapper = wrap(precision, outer)
    wrapper.mark_forward_method("fail")
    with pytest.raises(ZeroDivisionError) as plain:
        wrapper.fail()
    assert precision.asked == (plain.value, wrapper.module)
    assert plain.value.__cause__ is None
    precision.explained = KeyError("why")
    with pytest.raises(KeyError, match="why") as explained:
        wrapper.fail()
    assert isinstance(explained.value.__cause__, ZeroDivisionError)
    precision.explained = None
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        wrapper(torch.ones(1, 3))
    assert wrapper(ones()).shape == (1, 2)
    assert wrapper._forward_depth == 0


def test_its_repr_shows_the_model() -> None:
    assert repr(wrap()).startswith("ModuleWrapper(Model(\n  (layer): Linear")


class Gathers(FakeStrategy):
    """Shows another parameter than the one that the model holds, and writes down what it is told."""

    shards = True

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        self.shown = nn.Parameter(torch.full((2, 2), 7.0))

    def regain_shards(self, module: nn.Module) -> None:
        self.told.append("regain")

    def abandon(self, module: nn.Module) -> None:
        self.told.append("abandon")

    def explain(self, error: Exception, module: nn.Module, method: str) -> Exception | None:
        return UsageError(f"{method} divided") if isinstance(error, ZeroDivisionError) else None

    @contextmanager
    def shards_shown(self, module: Any) -> Iterator[None]:
        held, module.layer.weight = module.layer.weight, self.shown
        try:
            yield
        finally:
            module.layer.weight = held


def test_the_strategy_is_told_of_forwards_without_gradients_and_of_failures() -> None:
    strategy, model = Gathers(), Model()
    wrapper = ModuleWrapper(model, model, FullPrecision(), strategy)
    wrapper(ones())
    assert strategy.told == []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            wrapper(ones())
    wrapper.mark_forward_method("loss")
    with torch.no_grad():
        wrapper.loss(ones())
    assert strategy.told == ["regain"] * 3
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), torch.no_grad():
        wrapper(torch.ones(1, 3))
    assert strategy.told[3:] == ["abandon"]


def test_a_strategy_may_explain_the_error_of_a_method() -> None:
    model = Model()
    wrapper = ModuleWrapper(model, model, FullPrecision(), Gathers())
    with pytest.raises(UsageError, match="fail divided") as raised:
        wrapper.fail()
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    wrapper.mark_forward_method("fail")
    with pytest.raises(UsageError, match="fail divided"):
        wrapper.fail()
    model.forward = lambda x: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="divided"):
        wrapper(ones())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        wrapper.direct(ones()) and wrapper.harmful(torch.ones(1, 3))


def test_looks_through_the_wrapper_see_what_the_strategy_shows() -> None:
    strategy, model = Gathers(), Model()
    wrapper = ModuleWrapper(model, model, FullPrecision(), strategy)
    held = model.layer.weight
    assert next(iter(wrapper.parameters())) is strategy.shown
    assert dict(wrapper.named_parameters())["layer.weight"] is strategy.shown
    assert wrapper.get_parameter("layer.weight") is strategy.shown
    assert wrapper.state_dict()["layer.weight"][0, 0] == 7
    wrapper.requires_grad_(False)
    assert not strategy.shown.requires_grad
    assert held.requires_grad
    seen = []
    wrapper.apply(lambda module: seen.extend(module._parameters.values()))
    assert any(parameter is strategy.shown for parameter in seen)
    assert model.layer.weight is held
