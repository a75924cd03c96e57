"""Every optimizer of torch under FSDP, beside one process; run by test_optimizers.py.

The model has shards of different sizes, empty shards, tied parameters and a parameter without a dimension.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from nucleate import Runtime
from nucleate.cluster import process_group
from nucleate.errors import ConfigurationError, UsageError
from nucleate.precision import MixedPrecision
from nucleate.strategies import FSDPStrategy
from tests.multi.device import accelerator, device


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.up = nn.Linear(4, 7)
        self.down = nn.Linear(7, 4)
        self.single = nn.Parameter(torch.randn(1, 4))
        self.scale = nn.Parameter(torch.tensor(1.25))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.single
        x = x + self.down(torch.tanh(self.up(x))) * self.scale
        return F.cross_entropy(self.head(x).flatten(0, 1), (2 * tokens.flatten() + 1) % 5)


class ComplexModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4, dtype=torch.complex64))
        self.bias = nn.Parameter(torch.randn(1, 5, dtype=torch.complex64))
        self.scale = nn.Parameter(torch.tensor(1 + 0.5j))
        self.embed = nn.Embedding(5, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).to(torch.complex64) @ self.weight.T + self.bias
        return (x * self.scale).abs().square().mean()


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


def everything(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())


#: Optimizers that differ in their operations, by name: class, options, and the parameters that they get.
Case = tuple[type[optim.Optimizer], dict[str, Any], Callable[[nn.Module], list[nn.Parameter]]]
_ELEMENTWISE: list[tuple[type[optim.Optimizer], dict[str, Any]]] = [
    (optim.SGD, {"lr": 0.1}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (optim.Adam, {"lr": 0.05, "amsgrad": True, "weight_decay": 0.1}),
    (optim.AdamW, {"lr": 0.05}),
    (optim.Adadelta, {"lr": 1.0}),
    (optim.Adagrad, {"lr": 0.1}),
    (optim.Adamax, {"lr": 0.05}),
    (optim.NAdam, {"lr": 0.05, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    (optim.RAdam, {"lr": 0.05}),
    (optim.ASGD, {"lr": 0.05, "t0": 1}),
    (optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
]
CASES: dict[str, Case] = {
    f"{cls.__name__} {options}": (cls, options, everything)
    for cls, given in _ELEMENTWISE
    for options in (given, {**given, "foreach": True})
}
for cls in (optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad):
    CASES[f"{cls.__name__} fused"] = (cls, {"lr": 0.05, "fused": True}, everything)
CASES["Muon"] = (optim.Muon, {"lr": 0.02}, matrices)
CASES["Muon without nesterov"] = (optim.Muon, {"lr": 0.02, "nesterov": False}, matrices)

REFUSED = (optim.Adafactor, optim.LBFGS, optim.Rprop, optim.SparseAdam)


def batch(step: int) -> Tensor:
    return torch.randint(5, (8, 3), generator=torch.Generator(device()).manual_seed(step))


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()  # type: ignore[no-any-return]


def train_plainly(model_class: type[nn.Module], case: Case, num_steps: int) -> dict[str, Tensor]:
    cls, options, choose = case
    torch.manual_seed(0)
    model = model_class()
    optimizer = cls(choose(model), **options)
    for step in range(num_steps):
        optimizer.zero_grad()
        model(batch(step)).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def start(runtime: Runtime, model_class: type[nn.Module], case: Case, seed: int = 0) -> tuple[Any, Any]:
    cls, options, choose = case
    torch.manual_seed(seed)
    with runtime.init_module(empty_init=True):
        model = model_class()
    wrapped = runtime.setup(model)
    return wrapped, runtime.setup_optimizers(cls(choose(wrapped), **options))


def train(runtime: Runtime, model: Any, optimizer: Any, steps: Iterable[int], split: bool = True) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = model(batch(step).chunk(runtime.world_size)[runtime.global_rank] if split else batch(step))
        runtime.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def every_class_is_listed() -> None:
    classes = [c for c in vars(optim).values() if isinstance(c, type) and issubclass(c, optim.Optimizer)]
    listed = {case[0] for case in CASES.values()} | set(REFUSED) | {optim.Optimizer}
    assert set(classes) == listed


def every_optimizer_steps_as_one_process(runtime: Runtime) -> None:
    for name, case in CASES.items():
        expected = train_plainly(Model, case, 4)
        model, optimizer = start(runtime, Model, case)
        train(runtime, model, optimizer, range(4))
        for fqn, parameter in model.named_parameters():
            torch.testing.assert_close(
                whole(parameter), expected[fqn], rtol=1e-4, atol=1e-5, msg=lambda m, at=(name, fqn): f"{at}: {m}"
            )
        options = {key: value for key, value in optimizer.param_groups[0].items() if key in case[1]}
        assert options == case[1], "the step has changed the options"


def others_are_refused_by_name_before_anything_changes(runtime: Runtime) -> None:
    for cls in REFUSED:
        with runtime.init_module(empty_init=True):
            model = Model()
        with pytest.raises(ConfigurationError, match=rf"FSDP cannot step {cls.__name__}: .*strategy='ddp'"):
            runtime.setup(model, cls(model.parameters()))
        assert "deferred" in repr(model.up.weight)
        wrapped = runtime.setup(model)
        with pytest.raises(ConfigurationError, match=rf"FSDP cannot step {cls.__name__}"):
            runtime.setup_optimizers(cls(wrapped.parameters()))


def an_overflow_skips_a_fused_step_on_every_rank(strategy: Callable[[], FSDPStrategy]) -> None:
    for cls in (optim.SGD, optim.AdamW, optim.Adagrad):
        scaler = torch.amp.GradScaler(device().type, init_scale=64.0)
        precision = MixedPrecision(torch.float16, scaler=scaler)
        runtime = Runtime(accelerator=accelerator(), strategy=strategy(), precision=precision)
        model, optimizer = start(runtime, Model, (cls, {"lr": 0.1, "fused": True}, everything))
        moved = []
        for step in range(3):
            before = whole(model.up.weight)
            optimizer.zero_grad()
            runtime.backward(model(batch(step)) * (float("inf") if step == 1 and runtime.global_rank == 1 else 1.0))
            optimizer.step()
            moved.append(not torch.equal(before, whole(model.up.weight)))
        assert moved == [True, False, True], cls


def complex_parameters_train_as_in_one_process(folder: Path) -> None:
    # A unit has one dtype.
    runtime = Runtime(accelerator=accelerator(), strategy=FSDPStrategy(wrap={nn.Embedding}))
    for cls, options in ((optim.SGD, {}), (optim.AdamW, {}), (optim.AdamW, {"foreach": True})):
        case: Case = (cls, {"lr": 0.05, **options}, everything)
        expected = train_plainly(ComplexModel, case, 3)
        model, optimizer = start(runtime, ComplexModel, case)
        train(runtime, model, optimizer, range(3))
        for fqn, parameter in model.named_parameters():
            torch.testing.assert_close(whole(parameter), expected[fqn], rtol=1e-4, atol=1e-5)
        runtime.save(folder / cls.__name__, {"model": model, "optimizer": optimizer})
        losses = train(runtime, model, optimizer, range(3, 6))
        resumed, optimizer = start(runtime, ComplexModel, case, seed=1)
        runtime.load(folder / cls.__name__, {"model": resumed, "optimizer": optimizer})
        assert train(runtime, resumed, optimizer, range(3, 6)) == losses

        plain = ComplexModel()
        plain.load_state_dict({fqn: whole(tensor) for fqn, tensor in resumed.state_dict().items()})
        plain(batch(9)).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 1e-3)
        optimizer.zero_grad()
        runtime.backward(resumed(batch(9)))
        found = runtime.clip_gradients(resumed, optimizer, max_norm=1e-3)
        torch.testing.assert_close(whole(found), norm, rtol=1e-4, atol=1e-6)
        for ours, theirs in zip(resumed.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(whole(ours.grad), theirs.grad, rtol=1e-4, atol=1e-7)
        runtime.clip_gradients(resumed, optimizer, clip_val=1e-6)
        assert all(
            torch.view_as_real(whole(p.grad)).abs().max() <= 1e-6 for p in resumed.parameters() if p.is_complex()
        )


def an_early_optimizer_fails_by_name(runtime: Runtime) -> None:
    for empty_init in (True, False):
        with runtime.init_module(empty_init=empty_init):
            model = Model()
        early = [cls(model.parameters()) for cls in (optim.SGD, optim.AdamW, optim.LBFGS)]
        kept = list(model.down.parameters())
        wrapped, optimizer = runtime.setup(model, optim.SGD(model.up.parameters(), lr=0.1))
        message = r"former parameter single, which `setup` has replaced"
        for other in early:

            def closure(other: optim.Optimizer = other) -> Tensor:
                other.zero_grad()
                return torch.zeros(())

            with pytest.raises(UsageError, match=message):
                other.step(closure)
        with pytest.raises(UsageError, match=r"SGD has parameters .* down\.weight, down\.bias"):
            optimizer.add_param_group({"params": kept})
        optimizer.add_param_group({"params": wrapped.down.parameters()})
        before = whole(wrapped.down.weight)
        train(runtime, wrapped, optimizer, range(1))
        assert not torch.equal(before, whole(wrapped.down.weight))


def save(runtime: Runtime, folder: Path) -> None:
    """Train with every optimizer, save, and train on. All ranks get the whole batch, so that sums are exact."""
    losses = {}
    for number, (name, case) in enumerate(CASES.items()):
        model, optimizer = start(runtime, Model, case)
        train(runtime, model, optimizer, range(3), split=False)
        runtime.save(folder / str(number), {"model": model, "optimizer": optimizer})
        losses[name] = train(runtime, model, optimizer, range(3, 7), split=False)
    if runtime.is_global_zero:
        (folder / "losses.json").write_text(json.dumps(losses))
    runtime.barrier()


def resume(runtime: Runtime, folder: Path) -> None:
    losses = json.loads((folder / "losses.json").read_text())
    for number, (name, case) in enumerate(CASES.items()):
        model, optimizer = start(runtime, Model, case, seed=1)
        assert runtime.load(folder / str(number), {"model": model, "optimizer": optimizer}).is_exact
        found = train(runtime, model, optimizer, range(3, 7), split=False)
        # The fused kernels of SGD and Adagrad round in another order than the operations that step shards.
        if runtime.strategy.name == "fsdp" or "fused" not in name:
            assert found == losses[name], name
        else:
            torch.testing.assert_close(found, losses[name], rtol=1e-5, atol=1e-6, msg=name)


if __name__ == "__main__":
    what, place = sys.argv[1], Path(sys.argv[2])
    try:
        if what == "train":
            every_class_is_listed()
            runtime = Runtime(accelerator=accelerator(), strategy="fsdp")
            every_optimizer_steps_as_one_process(runtime)
            others_are_refused_by_name_before_anything_changes(runtime)
            an_overflow_skips_a_fused_step_on_every_rank(FSDPStrategy)
            complex_parameters_train_as_in_one_process(place)
            an_early_optimizer_fails_by_name(runtime)
        elif what == "hsdp":
            every_optimizer_steps_as_one_process(
                Runtime(accelerator=accelerator(), strategy=FSDPStrategy(num_replicas=2))
            )
        elif what == "save":
            runtime = Runtime(accelerator=accelerator(), strategy="fsdp")
            save(runtime, place)
            resume(runtime, place)
        else:
            resume(Runtime(accelerator=accelerator(), strategy=what), place)
        print("all optimizers hold")
    finally:
        process_group.stop()
