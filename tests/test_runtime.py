"""Runtime in one process: what it composes, what it refuses, and that a small training works as by hand."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nucleate import Runtime
from nucleate.deferred import handle_of, is_recording
from nucleate.errors import (
    ConfigurationError,
    DeferredEditError,
    DeferredUseError,
    NonFiniteGradientError,
    PluginNotFoundError,
    UninitializedError,
    UsageError,
)
from nucleate.materialize import block
from nucleate.precision.mixed import MixedPrecision
from nucleate.strategies import FSDPStrategy
from nucleate.strategies.single_device import SingleDeviceStrategy
from nucleate.wrappers.module import ModuleWrapper
from tests.deferred.equality import assert_same_model
from tests.device import ACCELERATOR, ON_CPU, device

pytestmark = pytest.mark.usefixtures("factories_on_device")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)
        self.register_buffer("inv_freq", 1 / torch.arange(1, 7, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x) * self.inv_freq.to(x.dtype)))


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(accelerator=ACCELERATOR)


# -- composition ---------------------------------------------------------------------------------------------


def test_names_stand_for_plugins_and_objects_are_taken_as_they_are() -> None:
    strategy = SingleDeviceStrategy()
    runtime = Runtime(accelerator=ACCELERATOR, strategy=strategy, precision=MixedPrecision(torch.bfloat16))
    assert runtime.strategy is strategy
    assert runtime.precision.name == "bf16-mixed"
    assert runtime.device == device()
    assert (runtime.world_size, runtime.global_rank, runtime.local_rank, runtime.node_rank) == (1, 0, 0, 0)
    assert runtime.is_global_zero


@pytest.mark.parametrize(("alias", "name"), [(32, "32-true"), ("bf16", "bf16-mixed"), (64, "64-true")])
def test_precisions_have_the_short_names_of_fabric(alias: Any, name: str) -> None:
    assert Runtime(accelerator=ACCELERATOR, precision=alias).precision.name == name


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strategy": "fdsp"}, PluginNotFoundError, "Did you mean 'fsdp'"),
        ({"precision": "bf16-ture"}, PluginNotFoundError, "Did you mean 'bf16-true'"),
        ({"accelerator": "gpu0"}, PluginNotFoundError, "Installed: .*cpu, cuda"),
        ({"strategy": 3}, ConfigurationError, "neither a name nor a Strategy"),
        ({"accelerator": SingleDeviceStrategy()}, ConfigurationError, "neither a name nor a Accelerator"),
        ({"devices": 2, "num_nodes": 3}, ConfigurationError, "--nnodes 3 --nproc-per-node 2"),
        (
            {"strategy": "single_device", "devices": 2},
            ConfigurationError,
            "one process, but `devices` asks for 2",
        ),
        ({"devices": 0}, ConfigurationError, "devices=0"),
        ({"devices": "many"}, ConfigurationError, "devices='many'"),
        ({"num_nodes": 0}, ConfigurationError, "num_nodes=0"),
        ({"strategy": FSDPStrategy(num_replicas=2)}, ConfigurationError, "does not divide the 1 processes"),
    ],
)
def test_wrong_arguments_are_refused_with_what_to_do(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Runtime(**{"accelerator": ACCELERATOR, **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigurationError, match=r"'cuda' was asked for.*accelerator='cpu'"):
        Runtime(accelerator="cuda")


@pytest.mark.parametrize(
    ("variables", "arguments", "message"),
    [
        ({}, {"strategy": "single_device"}, "runs in one process, but torchrun started 4"),
        ({}, {"devices": 3}, "ask for 3 processes, but torchrun started 4"),
        ({}, {"devices": 4, "num_nodes": 2}, "ask for 8 processes"),
        ({"MASTER_PORT": None}, {}, "but not MASTER_PORT"),
        ({"RANK": "two"}, {}, "RANK is 'two'"),
    ],
)
def test_what_does_not_fit_the_launched_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str | None], arguments: dict[str, Any], message: str
) -> None:
    started = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "0"}
    for name, value in {**started, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", **variables}.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigurationError, match=message):
        Runtime(accelerator=ACCELERATOR, **arguments)


def test_launch_is_optional_and_calls_a_function(runtime: Runtime) -> None:
    assert runtime.launch() is None
    assert runtime.launch(lambda rt, x, y: (rt, x + y), 1, y=2) == (runtime, 3)


@pytest.mark.parametrize("argument", [None, 3, "main"])
def test_launch_refuses_a_result_in_the_place_of_a_function(runtime: Runtime, argument: Any) -> None:
    with pytest.raises(UsageError, match=f"not {type(argument).__name__}.*`launch\\(main\\)`, not"):
        runtime.launch(argument)


# -- construction --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("empty_init", [True, False, None])
def test_weights_are_those_of_eager_construction_in_the_same_dtype(precision: str, empty_init: bool | None) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, precision=precision)
    torch.manual_seed(0)
    with runtime.precision.module_init_context():
        eager = Net()
    expected = torch.rand(2)
    torch.manual_seed(0)
    with runtime.init_module(empty_init=empty_init):
        model = Net()
    model = runtime.setup(model)
    assert torch.equal(torch.rand(2), expected)
    for name, parameter in eager.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
        assert model.get_parameter(name).dtype == runtime.precision.dtype
    assert model.inv_freq.dtype == torch.float32, "buffers are kept"
    assert torch.equal(model.inv_freq, eager.inv_freq)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_without_an_answer_a_block_defers_large_models_and_ends_with_real_tensors(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "ONSET_NUMEL", 1)
    runtime = Runtime(accelerator=ACCELERATOR, precision=precision)
    torch.manual_seed(0)
    with runtime.precision.module_init_context():
        eager = Net()
    expected = torch.rand(2)
    torch.manual_seed(0)
    with runtime.init_module():
        model = Net()
        assert is_recording() == ON_CPU
    assert torch.equal(torch.rand(2), expected)
    assert_same_model(eager, model)
    x = torch.ones(1, 6, dtype=model.body.weight.dtype)
    assert torch.equal(model(x), eager(x))
    nn.init.zeros_(model.head.bias)
    assert (runtime.setup(model).module.head.bias == 0).all()


def test_under_a_strategy_that_shards_a_model_without_an_answer_stays_deferred() -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="fsdp")
    with runtime.init_module():
        model = Net()
    assert handle_of(model.body.weight) is not None
    runtime.setup(model)


def test_parameters_made_in_another_dtype_are_cast_while_they_are_made() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(20, 20, dtype=torch.float32))
            self.tied = self.weight

    runtime = Runtime(accelerator=ACCELERATOR, precision="bf16-true")
    torch.manual_seed(0)
    eager = Mixed()
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        model = Mixed()
    original = model.weight
    model = runtime.setup(model)
    assert model.weight is original is model.tied
    assert torch.equal(model.weight, eager.weight.bfloat16())


def test_init_tensor_uses_device_and_dtype() -> None:
    runtime = Runtime(accelerator=ACCELERATOR, precision="bf16-true")
    with runtime.init_tensor():
        assert torch.zeros(2).dtype == torch.bfloat16
        assert torch.zeros(2, dtype=torch.float64).dtype == torch.float64
    assert torch.zeros(2).dtype == torch.float32


def test_the_default_dtype_is_restored_when_a_constructor_raises() -> None:
    runtime = Runtime(accelerator=ACCELERATOR, precision="16-true")
    with pytest.raises(ZeroDivisionError), runtime.init_module(empty_init=True):
        raise ZeroDivisionError
    assert torch.get_default_dtype() == torch.float32


# -- setup ---------------------------------------------------------------------------------------------------


def test_an_optimizer_built_on_deferred_parameters_trains_them(runtime: Runtime) -> None:
    torch.manual_seed(0)
    eager = Net()
    reference = torch.optim.AdamW(eager.parameters(), lr=0.1)
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer = runtime.setup(model, optimizer)
    x = torch.ones(3, 6)
    for _ in range(3):
        for net, opt, backward in (
            (eager, reference, Tensor.backward),
            (model, optimizer, runtime.backward),
        ):
            opt.zero_grad()
            backward(net(x).square().mean())
            opt.step()
    for name, parameter in eager.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_a_model_constructed_outside_can_be_set_up(runtime: Runtime) -> None:
    model = Net()
    before = model.body.weight.detach().clone()
    wrapped = runtime.setup(model)
    assert isinstance(wrapped, ModuleWrapper)
    assert torch.equal(wrapped.body.weight, before)
    assert list(wrapped.state_dict()) == list(model.state_dict())


def test_setup_twice_is_refused(runtime: Runtime) -> None:
    model = Net()
    wrapped = runtime.setup(model)
    for again in (model, wrapped, nn.Sequential(wrapped)):
        with pytest.raises(UsageError, match="set up already"):
            runtime.setup(again)
    optimizer = runtime.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UsageError, match="set up already"):
        runtime.setup_optimizers(optimizer)
    with pytest.raises(UsageError, match="set up already"):
        runtime.setup(Net(), optimizer)
    loader = runtime.setup_dataloaders(DataLoader(TensorDataset(torch.ones(4, 6))))
    with pytest.raises(UsageError, match="set up already"):
        runtime.setup_dataloaders(loader)


def test_an_optimizer_of_another_model_is_refused_before_anything_changes(runtime: Runtime) -> None:
    with runtime.init_module(empty_init=True):
        model, other = Net(), Net()
    optimizer = torch.optim.SGD([*model.body.parameters(), *other.head.parameters()], lr=0.1)
    with pytest.raises(ConfigurationError, match=r"2 parameters that Net does not have: head\.weight, head\.bias"):
        runtime.setup(model, optimizer)
    assert "deferred" in repr(model.body.weight)
    runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_an_optimizer_with_state_made_for_other_tensors_is_refused_before_anything_changes() -> None:
    sharded = Runtime(accelerator=ACCELERATOR, strategy="fsdp")
    real = Net()
    with pytest.raises(UsageError, match=r"Adagrad already has state.*setup_optimizers"):
        sharded.setup(real, torch.optim.Adagrad(real.parameters()))
    assert type(real.body.weight) is nn.Parameter
    runtime = Runtime(accelerator=ACCELERATOR)
    with runtime.init_module(empty_init=True):
        model = Net()
        early = torch.optim.Adagrad(model.parameters())
    with pytest.raises(UsageError, match="Adagrad already has state"):
        runtime.setup(model, early)
    model = runtime.setup(model)
    runtime.setup_optimizers(torch.optim.Adagrad(model.parameters()))


class ComplexNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
        self.scale = nn.Parameter(torch.tensor(1 + 2j))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex64) @ self.weight * self.scale).abs().square().mean()


@pytest.mark.parametrize("empty_init", [True, False])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_complex_parameters_train_and_are_clipped_as_in_plain_torch(
    precision: str, optimizer_class: Any, empty_init: bool
) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, precision=precision)
    torch.manual_seed(0)
    eager = ComplexNet()
    reference = optimizer_class(eager.parameters(), lr=0.1)
    torch.manual_seed(0)
    with runtime.init_module(empty_init=empty_init):
        net = ComplexNet()
    model, optimizer = runtime.setup(net, optimizer_class(net.parameters(), lr=0.1))
    x = torch.arange(6.0).view(2, 3)
    for _ in range(3):
        reference.zero_grad()
        eager(x).backward()
        expected = nn.utils.clip_grad_norm_(eager.parameters(), 0.5)
        reference.step()
        optimizer.zero_grad()
        runtime.backward(model(x))
        torch.testing.assert_close(runtime.clip_gradients(model, optimizer, max_norm=0.5), expected)
        optimizer.step()
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(net.get_parameter(name), parameter)
    runtime.clip_gradients(model, optimizer, clip_val=0.01)
    gradients = [torch.view_as_real(p.grad) for p in net.parameters() if p.grad is not None and p.grad.is_complex()]
    assert gradients
    assert all(gradient.abs().max() <= 0.01 for gradient in gradients)


class KeepsItsList(torch.optim.SGD):
    """Steps the list of parameters that it got, as LBFGS does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self._params = self.param_groups[0]["params"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self._params:
            parameter -= 0.1 * parameter.grad


def test_an_optimizer_that_keeps_its_own_list_is_pointed_to_the_new_parameters() -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy="fsdp")
    with runtime.init_module():
        net = Net()
    model, optimizer = runtime.setup(net, KeepsItsList(net.parameters()))
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(torch.ones(3, 6)).square().mean()
        runtime.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_an_optimizer_whose_model_has_no_values_yet_is_refused(runtime: Runtime) -> None:
    with runtime.init_module(empty_init=True):
        model = Net()
    with pytest.raises(
        UsageError, match=r"4 parameters without values: body\.weight, body\.bias.*runtime.setup\(model, o"
    ):
        runtime.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    on_meta = nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(UsageError, match=r"1 parameters without values: a parameter of shape \(3,\)"):
        runtime.setup_optimizers(torch.optim.SGD([on_meta], lr=0.1))
    with pytest.raises(UsageError, match=r"setup_optimizers takes torch\.optim\.Optimizers; got list"):
        runtime.setup_optimizers([on_meta])  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_parameters_that_no_model_has_train_in_one_process_as_in_plain_torch(precision: str) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, precision=precision)
    values = []
    for ours in (True, False):
        log_alpha = nn.Parameter(torch.tensor(0.5))
        optimizer = torch.optim.Adam([log_alpha], lr=0.1)
        if ours:
            optimizer = runtime.setup_optimizers(optimizer)
        for step in range(3):
            optimizer.zero_grad()
            loss = (log_alpha.exp() * (step - 1.5)).square()
            runtime.backward(loss) if ours else loss.backward()
            optimizer.step()
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        values.append(log_alpha.detach().clone())
    torch.testing.assert_close(*values, rtol=1e-3, atol=1e-4)


class Noting(SingleDeviceStrategy):
    """Notes the optimizers that it gets, and refuses those of class `SGD` with momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append(("check", "deferred" in repr(optimizer.param_groups[0]["params"][0])))
        if optimizer.defaults.get("momentum"):
            raise ConfigurationError("no momentum")

    def setup_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append(("setup", "deferred" in repr(optimizer.param_groups[0]["params"][0])))
        if len(optimizer.param_groups) > 2:
            raise ConfigurationError("too many groups")

    @contextmanager
    def optimizer_step_context(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        self.seen.append(("before step", type(optimizer)))
        yield
        self.seen.append(("after step", type(optimizer)))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        state["param_groups"][0]["lr"] = 0.75
        return state


def test_the_strategy_checks_prepares_steps_and_reads_every_optimizer(tmp_path: Path) -> None:
    strategy = Noting()
    runtime = Runtime(accelerator=ACCELERATOR, strategy=strategy)
    with runtime.init_module(empty_init=True):
        net = Net()
    with pytest.raises(ConfigurationError, match="no momentum"):
        runtime.setup(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    assert strategy.seen.pop() == ("check", True)
    assert "deferred" in repr(net.body.weight)

    model, optimizer = runtime.setup(net, torch.optim.SGD(net.body.parameters(), lr=0.1))
    assert strategy.seen == [("check", True), ("setup", False)]
    optimizer.step()
    assert strategy.seen[2:] == [("before step", torch.optim.SGD), ("after step", torch.optim.SGD)]

    strategy.seen.clear()
    optimizer.add_param_group({"params": [net.head.bias]})
    assert strategy.seen == [("setup", False)]
    with pytest.raises(ConfigurationError, match="too many groups"):
        optimizer.add_param_group({"params": [net.head.weight]})
    assert len(optimizer.param_groups) == 2

    strategy.seen.clear()
    runtime.setup_optimizers(torch.optim.SGD(net.parameters(), lr=0.1))
    assert strategy.seen == [("check", False), ("setup", False)]
    with pytest.raises(ConfigurationError, match="no momentum"):
        runtime.setup_optimizers(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))

    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.75
    assert optimizer.param_groups[0]["lr"] == 0.1
    runtime.save(tmp_path / "state.pt", {"model": model, "optimizer": optimizer})
    runtime.load(tmp_path / "state.pt", {"model": model, "optimizer": optimizer})
    assert optimizer.param_groups[0]["lr"] == 0.75


@pytest.mark.parametrize("wrong", [None, {"model": 1}, torch.ones(2), [nn.Linear(2, 2)]])
def test_setup_says_what_it_takes(runtime: Runtime, wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"setup takes a torch\.nn\.Module"):
        runtime.setup(wrong)
    with pytest.raises(UsageError, match="setup takes optimizers after the model"):
        runtime.setup(Net(), wrong)


def test_use_and_edit_before_setup_are_refused(runtime: Runtime) -> None:
    with runtime.init_module(empty_init=True):
        model = Net()
    with pytest.raises(DeferredUseError, match=r"body\.weight is deferred"):
        model(torch.ones(1, 6))
    with pytest.raises(DeferredEditError, match=r"head\.bias is deferred"):
        nn.init.zeros_(model.head.bias)
    with pytest.raises(DeferredUseError, match="has no value"):
        runtime.backward(torch.empty((), device="meta"))
    runtime.setup(model)


PRECISIONS = ["32-true", "bf16-true", "bf16-mixed", "64-true"]


def eager_and_deferred(precision: str, story: Callable[[Runtime, bool], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Return what a story gives with `empty_init=False` and with True, set up, with equal streams asserted."""
    models, streams = [], []
    for empty_init in (False, True):
        runtime = Runtime(accelerator=ACCELERATOR, precision=precision)
        runtime.seed_everything(5)
        model = story(runtime, empty_init)
        streams.append(torch.rand(3))
        runtime.setup(model)
        models.append(model)
    assert torch.equal(*streams)
    return models[0], models[1]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_may_be_copied_cast_tied_and_edited_again_before_setup(precision: str) -> None:
    def story(runtime: Runtime, empty_init: bool) -> nn.Module:
        with runtime.init_module(empty_init=empty_init):
            model = Net()
        model.teacher = copy.deepcopy(model.body)
        model.teacher.requires_grad_(False)
        model.half()
        model.head.double()
        with runtime.init_module(empty_init=empty_init):
            model.extra = nn.Linear(6, 6)
            model.body.apply(lambda module: nn.init.trunc_normal_(module.weight))
            model.head.load_state_dict({"weight": torch.ones(2, 6), "bias": torch.zeros(2)})
        model.extra.bias = model.body.bias
        model.new = nn.Parameter(model.body.weight.detach().t())
        model.real = nn.Linear(3, 3)
        return model

    assert_same_model(*eager_and_deferred(precision, story))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False, None])
def test_init_module_blocks_nest(precision: str, outer: bool, inner: bool | None) -> None:
    def story(runtime: Runtime, empty_init: bool) -> nn.Module:
        with runtime.init_module(empty_init=empty_init and outer):
            model = nn.Sequential(Net())
            with runtime.init_module(empty_init=inner if empty_init else False):
                model.append(nn.Linear(40, 40))
                is_deferred = handle_of(model[1].weight) is not None or is_recording_to(model[1].weight)
                assert is_deferred == (empty_init and (outer if inner is None else inner))
            model.append(nn.Linear(40, 40))
        return model

    assert_same_model(*eager_and_deferred(precision, story))


def is_recording_to(tensor: Tensor) -> bool:
    """Return whether a tensor is on the meta device, whatever it says of itself inside a context."""
    with torch._C.DisableTorchFunction():
        return tensor.is_meta


def test_two_models_and_their_parts_are_set_up_one_after_the_other(runtime: Runtime) -> None:
    def make() -> tuple[nn.Module, nn.Module]:
        first, second = Net(), Net()
        second.body.weight = first.body.weight
        second.inv_freq = first.inv_freq[:3]
        return first, second

    runtime.seed_everything(3)
    with runtime.init_module(empty_init=False):
        expected = make()
    runtime.seed_everything(3)
    with runtime.init_module(empty_init=True):
        models = make()
    runtime.setup(models[1])
    assert handle_of(models[0].head.weight) is not None
    runtime.setup(models[0])
    assert_same_model(nn.ModuleList(expected), nn.ModuleList(models))


def test_nothing_of_the_record_stays_after_setup(runtime: Runtime) -> None:
    with runtime.init_module(empty_init=True):
        model, other = Net(), Net()
    with pytest.raises(DeferredUseError):
        model(torch.ones(1, 6))
    twin = copy.deepcopy(model)
    model.body.weight.register_hook(lambda gradient: gradient * 2)
    optimizer = torch.optim.AdamW(model.parameters())
    record, tape = (
        weakref.ref(x) for x in (handle_of(model.body.weight).record, handle_of(twin.body.weight).record.tape)
    )
    wrapped, optimizer = runtime.setup(model, optimizer)
    runtime.setup(twin)
    gc.collect()
    assert record() is not None, "another model still needs it"
    wrapped_other = runtime.setup(other)
    gc.collect()
    assert record() is None
    assert tape() is None
    del wrapped, optimizer, wrapped_other


def test_a_setup_that_is_refused_leaves_the_model_deferred(runtime: Runtime) -> None:
    with runtime.init_module(empty_init=True):
        model = Net()
        model.forgotten = nn.Parameter(torch.empty(3))
    with pytest.raises(UninitializedError, match="forgotten"):
        runtime.setup(model)
    with pytest.raises(DeferredUseError, match=r"body\.weight"):
        model(torch.ones(1, 6))
    with runtime.init_module(empty_init=True):
        nn.init.zeros_(model.forgotten)
    assert runtime.setup(model)(torch.ones(1, 6)).isfinite().all()


def test_an_uninitialized_parameter_is_refused(runtime: Runtime) -> None:
    with runtime.init_module(empty_init=True):
        model = nn.Module()
        model.scale = nn.Parameter(torch.empty(3))
    with pytest.raises(UninitializedError, match="scale"):
        runtime.setup(model)


# -- training ------------------------------------------------------------------------------------------------


def test_backward_outside_of_runtime_is_refused_where_the_loss_is_scaled() -> None:
    runtime = Runtime(accelerator=ACCELERATOR, precision="16-mixed")
    model = runtime.setup(Net())
    loss = model(torch.ones(2, 6)).float().square().mean()
    with pytest.raises(UsageError, match=r"runtime\.backward"):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())
    runtime.backward(model(torch.ones(2, 6)).float().square().mean())
    assert all(p.grad is not None for p in model.parameters())


def test_clipping_takes_exactly_one_way(runtime: Runtime) -> None:
    model, optimizer = runtime.setup(net := Net(), torch.optim.SGD(net.parameters(), lr=0.1))
    runtime.backward(model(torch.ones(2, 6)).sum())
    for arguments in ({}, {"clip_val": 1.0, "max_norm": 1.0}, {"max_norm": -1.0}, {"clip_val": float("nan")}):
        with pytest.raises(ConfigurationError):
            runtime.clip_gradients(model, optimizer, **arguments)
    norm = runtime.clip_gradients(model, optimizer, max_norm=0.01)
    assert norm is not None
    assert norm > 0.01
    assert nn.utils.get_total_norm([p.grad for p in model.parameters()]).item() == pytest.approx(0.01, rel=1e-4)
    assert runtime.clip_gradients(model, optimizer, clip_val=1e-4) is None
    assert max(float(p.grad.abs().max()) for p in model.parameters()) <= 1e-4


def test_nonfinite_gradients_are_refused_untouched_unless_asked_otherwise(runtime: Runtime) -> None:
    model, optimizer = runtime.setup(net := Net(), torch.optim.SGD(net.parameters(), lr=0.1))
    runtime.backward(model(torch.ones(2, 6)).sum())
    net.body.weight.grad[0, 0] = float("inf")
    before = net.head.weight.grad.clone()
    with pytest.raises(NonFiniteGradientError, match="inf"):
        runtime.clip_gradients(model, optimizer, max_norm=1.0)
    assert torch.equal(net.head.weight.grad, before)
    norm = runtime.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False)
    assert norm is not None
    assert norm.isinf()


def test_no_backward_sync_wants_a_model_that_is_set_up(runtime: Runtime) -> None:
    with pytest.raises(UsageError, match="Set it up first"), runtime.no_backward_sync(Net()):
        pass
    with runtime.no_backward_sync(runtime.setup(Net()), enabled=False):
        pass


def test_a_data_loader_gives_the_samples_in_the_order_of_a_plain_one(runtime: Runtime) -> None:
    with torch.device("cpu"):  # torch's samplers fail with another default device.
        data = TensorDataset(torch.arange(10))
        plain = DataLoader(data, batch_size=3, shuffle=True)
        loader = runtime.setup_dataloaders(plain)
        torch.manual_seed(7)
        seen = torch.cat([batch for (batch,) in loader])
        state = torch.get_rng_state()
        torch.manual_seed(7)
        expected = torch.cat([batch for (batch,) in plain])
    assert seen.device == runtime.device
    assert seen.tolist() == expected.tolist()
    assert torch.equal(state, torch.get_rng_state())


def test_collectives_have_the_same_shapes_as_with_many_ranks(runtime: Runtime) -> None:
    assert runtime.all_gather(torch.ones(3)).shape == (1, 3)
    assert runtime.all_gather({"a": 1.5})["a"].shape == (1,)
    assert float(runtime.all_reduce(torch.tensor(3))) == 3.0
    assert runtime.broadcast({"a": [1]}) == {"a": [1]}
    runtime.barrier()
    with runtime.rank_zero_first():
        pass


def test_to_device_moves_collections_and_modules(runtime: Runtime) -> None:
    moved = runtime.to_device({"x": [torch.ones(1)], "y": "text"})
    assert moved["y"] == "text"
    module = nn.Linear(2, 2)
    assert runtime.to_device(module) is module


def test_print_prints_on_rank_zero(runtime: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    runtime.print("loss", 3)
    assert capsys.readouterr().out == "loss 3\n"


def test_seed_everything_seeds_python_numpy_and_torch(runtime: Runtime) -> None:
    draws = []
    for _ in range(2):
        assert runtime.seed_everything(12) == 12
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1]


def test_a_run_resumes_exactly(runtime: Runtime, tmp_path: Path) -> None:
    def start() -> tuple[Any, Any, Any]:
        torch.manual_seed(1)
        with runtime.init_module(empty_init=True):
            net = Net()
        model, optimizer = runtime.setup(net, torch.optim.AdamW(net.parameters(), lr=0.1))
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)

    def step(model: Any, optimizer: Any, scheduler: Any) -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(3, 6)).square().mean()
        runtime.backward(loss)
        optimizer.step()
        scheduler.step()
        return loss.item()

    parts = start()
    for _ in range(3):
        step(*parts)
    state = {"model": parts[0], "optimizer": parts[1], "scheduler": parts[2], "step": 3}
    runtime.save(tmp_path / "checkpoint", state)
    expected = [step(*parts) for _ in range(4)]

    parts = start()
    state = {"model": parts[0], "optimizer": parts[1], "scheduler": parts[2], "step": 0}
    assert runtime.load(tmp_path / "checkpoint", state) == {}
    assert state["step"] == 3
    assert [step(*parts) for _ in range(4)] == expected
    assert set(runtime.load(tmp_path / "checkpoint")) == {"model", "optimizer", "scheduler", "step"}


def test_a_wrapped_model_and_optimizer_pickle(runtime: Runtime) -> None:
    model, optimizer = runtime.setup(net := Net(), torch.optim.SGD(net.parameters(), lr=0.1))
    model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    assert model(torch.ones(1, 6)).shape == (1, 2)
    assert optimizer.param_groups[0]["params"][0] is model.body.weight
