"""On 2 ranks: compiled models and activation checkpointing train as the plain model, under its names and keys.

Argument: a folder that all ranks see.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from nucleate import Runtime
from nucleate.errors import ConfigurationError
from nucleate.shells import named_modules
from nucleate.wrappers import ModuleWrapper


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


class Backend:
    """Counts the calls of compiled graphs."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        def run(*args: Any) -> Any:
            self.num_calls += 1
            return graph.forward(*args)

        return run


def whole(model: nn.Module, backend: Backend) -> Any:
    return torch.compile(model, backend=backend)


def parts(model: Any, backend: Backend) -> Any:
    for number in range(2):
        model.blocks[number] = torch.compile(model.blocks[number], backend=backend)
    return model


def activations(model: Any, backend: Backend) -> Any:
    for number in range(2):
        model.blocks[number] = checkpoint_wrapper(model.blocks[number])
    return model


def everything(model: Any, backend: Backend) -> Any:
    return whole(parts(activations(model, backend), backend), backend)


def at_the_root(model: nn.Module, backend: Backend) -> nn.Module:
    return checkpoint_wrapper(model)


def exchanged_twice(model: Any, backend: Backend) -> Any:
    model.head = DistributedDataParallel(model.head)
    return model


Change = Callable[[Any, Backend], Any]
EARLY: list[Change] = [whole, parts, activations, everything, at_the_root, exchanged_twice]
LATE: list[Change] = [whole, parts, activations]
COMPILES = (whole, parts, everything)


def deferred(runtime: Runtime) -> nn.Module:
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        return Model()


def train(runtime: Runtime, model: Any, optimizer: Any) -> list[float]:
    data = torch.randn(2, 2, 4, 8, generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(2):
        for micro in range(2):
            with runtime.no_backward_sync(model, enabled=micro == 0):
                loss = model(data[micro, runtime.global_rank]).square().mean()
                runtime.backward(loss / 2)
        runtime.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(runtime.all_reduce(loss.detach()).item())
    return losses


def changed_models(runtime: Runtime) -> Any:
    """Yield the name of each change, the changed model, its optimizer and its backend."""
    for change in EARLY:
        if change is exchanged_twice and runtime.strategy.name == "ddp":
            with pytest.raises(ConfigurationError, match="^head of this model is a DistributedDataParallel"):
                runtime.setup(change(Model(), Backend()))
            continue
        if change is exchanged_twice:
            torch.manual_seed(0)
            model = change(Model(), backend := Backend())
        else:
            model = change(deferred(runtime), backend := Backend())
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        yield f"{change.__name__} before", change, *runtime.setup(model, optimizer), backend
    for change in LATE:
        model = change(runtime.setup(deferred(runtime)), backend := Backend())
        optimizer = runtime.setup_optimizers(torch.optim.AdamW(model.parameters(), 0.1))
        yield f"{change.__name__} after", change, model, optimizer, backend


def a_changed_model_trains_as_the_plain_one_under_its_keys(strategy: str, folder: Path) -> None:
    runtime = Runtime(accelerator="cpu", strategy=strategy)
    model = deferred(runtime)
    model, optimizer = runtime.setup(model, torch.optim.AdamW(model.parameters(), 0.1))
    expected = train(runtime, model, optimizer)
    runtime.save(folder / "plain", {"model": model, "optimizer": optimizer})
    runtime.save(folder / "plain.safetensors", model)
    names = list(Model().state_dict())
    weights = load_file(folder / "plain.safetensors")
    for title, change, changed, optimizer, backend in changed_models(runtime):
        torch._dynamo.reset()
        assert train(runtime, changed, optimizer) == pytest.approx(expected, abs=1e-5), title
        assert (backend.num_calls > 0) is (change in COMPILES), title
        if isinstance(changed, ModuleWrapper):
            assert [name for name, _ in changed.named_parameters()] == names, title
            assert list(changed.state_dict()) == names, title
        runtime.save(folder / "changed.safetensors", changed)
        saved = load_file(folder / "changed.safetensors")
        assert saved.keys() == weights.keys(), title
        assert all(torch.allclose(saved[name], weights[name], atol=1e-5) for name in names), title
        runtime.save(folder / "changed", {"model": changed, "optimizer": optimizer})
        again = runtime.load(folder / "changed", remainder=True)
        assert list(again["optimizer"]["state"]) == [f"model.{name}" for name in names], title
        for path in ("plain", "changed"):
            assert runtime.load(folder / path, {"model": changed, "optimizer": optimizer}).is_exact, title
        for parameter in changed.parameters():
            nn.init.zeros_(parameter.detach())
        assert runtime.load_raw(folder / "changed.safetensors", changed).is_exact, title
        runtime.save(folder / "loaded.safetensors", changed)
        loaded = load_file(folder / "loaded.safetensors")
        assert all(torch.equal(loaded[name], saved[name]) for name in names), title
        runtime.barrier()


def weights_with_a_prefix_are_read_by_shards(strategy: str, folder: Path) -> None:
    runtime = Runtime(accelerator="cpu", strategy=strategy)
    torch.manual_seed(3)
    source = Model()
    if runtime.is_global_zero:
        torch.save(everything(source, Backend()).state_dict(), folder / "prefixed.pt")
    runtime.barrier()
    for change in (lambda model, _: model, whole, everything):
        model = change(deferred(runtime), Backend())
        assert runtime.load_raw(folder / "prefixed.pt", model).is_exact
        model = runtime.setup(model)
        runtime.save(folder / "read.safetensors", model)
        read = load_file(folder / "read.safetensors")
        torch.manual_seed(3)
        assert all(torch.equal(read[name], tensor) for name, tensor in Model().state_dict().items())
        runtime.barrier()


def units_of_fsdp_are_the_outermost_shells(strategy: str, folder: Path) -> None:
    if strategy != "fsdp":
        return
    from nucleate.strategies import FSDPStrategy

    for wrap in ("auto", [Block], lambda name, module: name in ("blocks.0", "blocks.1")):
        runtime = Runtime(accelerator="cpu", strategy=FSDPStrategy(wrap=wrap))  # type: ignore[arg-type]
        model = runtime.setup(parts(activations(deferred(runtime), Backend()), Backend()))
        units = [
            (name, type(module).__name__) for name, module in named_modules(model) if isinstance(module, FSDPModule)
        ]
        assert units == [
            ("", "FSDPModel"),
            ("blocks.0", "FSDPOptimizedModule"),
            ("blocks.1", "FSDPOptimizedModule"),
        ]


def errors_of_a_strategy_use_plain_names(strategy: str, folder: Path) -> None:
    if strategy != "fsdp":
        return
    runtime = Runtime(accelerator="cpu", strategy=strategy)
    model = deferred(runtime)
    with runtime.init_module(empty_init=True):
        model.blocks[0].up.weight = nn.Parameter(torch.ones(8, 16).t())
    with pytest.raises(ConfigurationError, match=r"not contiguous: blocks\.0\.up\.weight\."):
        runtime.setup(everything(model, Backend()))


CHECKS: list[Callable[[str, Path], None]] = [
    a_changed_model_trains_as_the_plain_one_under_its_keys,
    weights_with_a_prefix_are_read_by_shards,
    units_of_fsdp_are_the_outermost_shells,
    errors_of_a_strategy_use_plain_names,
]

if __name__ == "__main__":
    for check in CHECKS:
        check(sys.argv[1], Path(sys.argv[2]))
        sys.stdout.write(f"{check.__name__}\n")
