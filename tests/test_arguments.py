"""The arguments that methods of `Runtime` have in common with Lightning Fabric, in one process."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from nucleate import Runtime, is_wrapped
from nucleate.errors import CheckpointError, CheckpointNotFoundError, ConfigurationError, UsageError
from nucleate.precision import MixedPrecision
from nucleate.strategies import DDPStrategy
from tests.device import ACCELERATOR, cpu_only, device

pytestmark = pytest.mark.usefixtures("factories_on_device")


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(accelerator=ACCELERATOR)


# -- run -----------------------------------------------------------------------------------------------------


class Trainer(Runtime):
    def run(self, factor: float, *, offset: float = 0.0) -> float:
        return float(self.all_reduce(factor)) + offset + (1.0 if self._launched else 0.0)


class Longer(Trainer):
    def run(self, factor: float, *, offset: float = 0.0) -> float:
        return super().run(factor, offset=offset) * 10


def test_run_of_a_subclass_launches_first_and_returns_its_result() -> None:
    trainer = Trainer(accelerator=ACCELERATOR)
    assert not trainer._launched
    assert trainer.run(2.0, offset=0.5) == 3.5
    assert trainer.run(2.0) == 3.0
    assert Longer(accelerator=ACCELERATOR).run(2.0) == 30.0
    assert Runtime(accelerator=ACCELERATOR).run(1, step=2) is None  # type: ignore[func-returns-value]


# -- setup ---------------------------------------------------------------------------------------------------


def test_the_scheduler_comes_last_and_schedules_the_wrapped_optimizer(runtime: Runtime) -> None:
    with runtime.init_module(empty_init=True):
        model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    wrapped, same, last = runtime.setup(model, optimizer, scheduler=scheduler)
    assert last is scheduler
    for expected in (1.0, 0.5):
        assert same.param_groups[0]["lr"] == expected
        runtime.backward(wrapped(torch.ones(1, 2)).sum())
        same.step()
        last.step()
    with pytest.raises(ConfigurationError, match="scheduler without its optimizer"):
        runtime.setup(nn.Linear(2, 2), scheduler=scheduler)


def test_without_moving_real_tensors_stay_and_deferred_ones_are_made_on_the_device(runtime: Runtime) -> None:
    class Both(nn.Module):
        def __init__(self, real: nn.Parameter) -> None:
            super().__init__()
            self.real = real
            self.deferred = nn.Linear(2, 2)

    real = nn.Parameter(torch.ones(2, device="cpu"))
    with runtime.init_module(empty_init=True):
        model = Both(real)
    wrapped = runtime.setup(model, move_to_device=False)
    assert wrapped.real.device.type == "cpu"
    assert wrapped.deferred.weight.device == device()
    kept = nn.Parameter(torch.ones(2, device="cpu"))
    module = nn.ParameterList([kept])
    runtime.setup_module(module, move_to_device=False)
    assert module[0] is kept


def test_a_strategy_of_several_processes_refuses_a_model_that_would_stay_elsewhere() -> None:
    class Elsewhere(nn.Parameter):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("xpu:3")

    model = nn.Linear(2, 2)
    runtime = Runtime(accelerator=ACCELERATOR, strategy=DDPStrategy())
    if ACCELERATOR == "cpu":
        model.weight = Elsewhere(torch.ones(2, 2))
    else:
        model.weight = nn.Parameter(torch.ones(2, 2, device="cpu"))
    with pytest.raises(ConfigurationError, match=r"move_to_device=False weight on .* would stay there"):
        runtime.setup(model, move_to_device=False)
    runtime.setup(nn.Linear(2, 2), move_to_device=False)


@cpu_only("torch.compile has no backend for the simulated device")
def test_a_compiled_model_is_compiled_again_unless_told_otherwise(runtime: Runtime) -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    for again in (False, True):
        torch._dynamo.reset()
        model = runtime.setup(torch.compile(nn.Linear(2, 2), backend=backend), _reapply_compile=again)
        model(torch.ones(1, 2))
        assert bool(compiled) is again
    assert is_wrapped(torch.compile(model, backend="eager"))


# -- backward and clipping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [False, True])
def test_backward_passes_its_arguments_on(scales: bool) -> None:
    scaler = torch.amp.GradScaler(ACCELERATOR, init_scale=64.0) if scales else None
    precision = MixedPrecision(torch.float16 if scales else torch.bfloat16, scaler=scaler)
    runtime = Runtime(accelerator=ACCELERATOR, precision=precision)
    plain = nn.Linear(2, 2)
    model, optimizer = runtime.setup(plain, torch.optim.SGD(plain.parameters(), lr=1.0))
    out = model(torch.ones(1, 2))
    runtime.backward(out, torch.ones_like(out), retain_graph=True)
    runtime.backward(out[:, 0].sum(), model=model, inputs=[model.bias])
    runtime.clip_gradients(model, optimizer, 1.5)
    torch.testing.assert_close(model.bias.grad, torch.tensor([1.5, 1.0]))
    torch.testing.assert_close(model.weight.grad, torch.ones(2, 2))
    with pytest.raises(UsageError, match=r"backward\(model=...\) takes a model that was set up, not this Linear"):
        runtime.backward(model(torch.ones(1, 2)).sum(), model=nn.Linear(2, 2))


# -- ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SUM", "prod", "avg", "Max", torch.distributed.ReduceOp.MIN])
def test_operations_have_the_names_that_torch_and_fabric_give_them(runtime: Runtime, name: Any) -> None:
    assert runtime.all_reduce(3.0, reduce_op=name).item() == 3.0
    assert runtime.all_reduce(3.0, None, name).item() == 3.0


def test_an_unknown_operation_or_group_is_refused(runtime: Runtime) -> None:
    for wrong in ("median", torch.distributed.ReduceOp.BAND, None):
        with pytest.raises(ConfigurationError, match="reduce_op is .*allowed are 'mean'"):
            runtime.all_reduce(1.0, reduce_op=wrong)
    with pytest.raises(ConfigurationError, match="all_reduce: group is 'sum'.*by their names"):
        runtime.all_reduce(1.0, "sum")
    with pytest.raises(ConfigurationError, match="all_gather: group is True"):
        runtime.all_gather(torch.ones(1), True)


def test_barriers_may_have_a_name_and_the_first_rank_of_a_node_may_go_first(runtime: Runtime) -> None:
    runtime.barrier("loaded")
    with runtime.rank_zero_first(local=True):
        pass


# -- checkpoints ---------------------------------------------------------------------------------------------


class Unsafe:
    made = 0

    def __init__(self, value: int) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return _make, (self.value,)


def _make(value: int) -> Unsafe:
    Unsafe.made += 1
    return Unsafe(value)


@pytest.fixture
def trusted_file(tmp_path: Path) -> Iterator[Path]:
    Unsafe.made = 0
    state = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    options = argparse.Namespace(lr=0.1)
    torch.save({"model": state, "options": options, "inner": {"list": [1, Unsafe(7)]}}, tmp_path / "file.ckpt")
    return iter([tmp_path / "file.ckpt"])


@pytest.mark.parametrize("weights_only", [None, True])
def test_code_of_a_file_does_not_run_unless_the_user_trusts_it(
    runtime: Runtime, trusted_file: Iterator[Path], weights_only: bool | None
) -> None:
    with pytest.raises(CheckpointError, match=r"without running code.*weights_only=False"):
        runtime.load(next(trusted_file), weights_only=weights_only)
    assert Unsafe.made == 0


def test_a_trusted_file_gives_its_objects_back(runtime: Runtime, trusted_file: Iterator[Path]) -> None:
    model, path = nn.Linear(2, 2), next(trusted_file)
    report = runtime.load(path, {"model": model}, strict=False, weights_only=False, remainder=True)
    assert report["options"].lr == 0.1
    assert report["inner"]["list"][1].value == 7
    assert model.weight.eq(1).all()
    other = nn.Linear(2, 2)
    runtime.load_raw(path, other, prefix="model.", weights_only=False)
    assert other.weight.eq(1).all()


@pytest.mark.parametrize("strategy", ["single_device", "ddp", "fsdp"])
def test_load_raw_takes_the_state_of_an_optimizer(tmp_path: Path, strategy: str) -> None:
    plain = nn.Linear(2, 2)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.25)
    plain(torch.ones(1, 2)).sum().backward()
    reference.step()
    torch.save(reference.state_dict(), tmp_path / "optimizer.pt")
    torch.save({"model": plain.state_dict(), "optimizer": reference.state_dict()}, tmp_path / "both.pt")
    expected = reference.state[plain.weight]["exp_avg"]
    for name, prefix in (("optimizer.pt", ""), ("both.pt", "optimizer.")):
        runtime = Runtime(accelerator=ACCELERATOR, strategy=strategy)
        again = nn.Linear(2, 2)
        model, optimizer = runtime.setup(again, torch.optim.AdamW(again.parameters(), lr=0.5))
        runtime.load_raw(tmp_path / name, optimizer, prefix=prefix)
        moment: Tensor = optimizer.state[model.weight]["exp_avg"]
        assert torch.equal(moment.full_tensor() if hasattr(moment, "full_tensor") else moment, expected)  # type: ignore[operator]
        assert optimizer.param_groups[0]["lr"] == 0.25
    with pytest.raises(CheckpointNotFoundError, match=r"no state of an optimizer in .*prefix='optimizer.'"):
        runtime.load_raw(tmp_path / "both.pt", optimizer)
    with pytest.raises(ConfigurationError, match="keys= and mmap= are for models"):
        runtime.load_raw(tmp_path / "both.pt", optimizer, mmap=True)
    runtime.save(tmp_path / "ours", {"model": model, "optimizer": optimizer})
    with pytest.raises(CheckpointError, match="has the names of its parameters. `load` finds them"):
        runtime.load_raw(tmp_path / "ours", optimizer, prefix="optimizer.")


# -- what setup returns --------------------------------------------------------------------------------------


def test_what_setup_returns_is_wrapped_and_what_it_got_is_not(runtime: Runtime) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader([1, 2])  # type: ignore[arg-type]
    wrapped = (*runtime.setup(model, optimizer), runtime.setup_dataloaders(loader))
    assert all(map(is_wrapped, wrapped))
    assert not any(map(is_wrapped, (model, optimizer, loader, None, nn.Module, 3)))
    assert isinstance(wrapped[1], torch.optim.SGD)


class Stepping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Tensor, number: int) -> Tensor:
        return self(batch).sum() + number

    def validation_step(self, batch: Tensor) -> tuple[bool, Tensor]:
        return torch.is_autocast_enabled(device().type), self(batch)

    test_step = predict_step = validation_step


@pytest.mark.parametrize("strategy", ["single_device", "ddp", "fsdp"])
def test_the_steps_of_a_lightning_module_go_through_precision_and_strategy(strategy: str) -> None:
    runtime = Runtime(accelerator=ACCELERATOR, strategy=strategy, precision="bf16-mixed")
    with runtime.init_module(empty_init=True):
        module = Stepping()
    model = runtime.setup(module)
    runtime.backward(model.training_step(torch.ones(1, 2), number=1))
    assert model.layer.weight.grad is not None
    for name in ("validation_step", "test_step", "predict_step"):
        inside, out = getattr(model, name)(torch.ones(1, 2))
        assert inside
        assert out.dtype == torch.float32


# -- forward_backward ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_one_call_runs_forward_the_loss_and_backward(runtime: Runtime, form: str) -> None:
    model = runtime.setup(torch.nn.Linear(3, 2))
    inputs, targets = torch.randn(4, 3), torch.randn(4, 2)
    given = {"tensor": inputs, "tuple": (inputs,), "dict": {"input": inputs}}[form]
    loss = runtime.forward_backward(model, (given, targets), torch.nn.functional.mse_loss)
    gradient = model.weight.grad
    assert gradient is not None
    assert not loss.requires_grad
    expected = torch.nn.functional.mse_loss(model(inputs), targets)
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected, model.weight)[0])


def test_a_batch_is_a_pair(runtime: Runtime) -> None:
    model = runtime.setup(torch.nn.Linear(3, 2))
    for wrong in (torch.ones(2, 3), (torch.ones(2, 3),)):
        with pytest.raises(UsageError, match=r"the pair \(inputs, targets\)"):
            runtime.forward_backward(model, wrong, torch.nn.functional.mse_loss)
