"""Modules that compute their activations a second time: the same bits, the same names, less memory."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from nucleate import Runtime
from nucleate.dimensions.recomputation import CheckpointedForward
from nucleate.errors import ConfigurationError
from nucleate.strategies import SingleDeviceStrategy
from tests.device import ACCELERATOR, cpu_only, device

pytestmark = pytest.mark.usefixtures("factories_on_device")


class Block(nn.Module):
    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.5)
        self.down = parametrizations.spectral_norm(nn.Linear(16, 8))

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        Block.runs += 1
        x = x + self.down(self.dropout(torch.tanh(self.norm(self.up(x)))))
        # The dtype of this tensor is the default dtype.
        return x * torch.full((), 0.5, device=x.device) if scale is None else x * scale


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=scale)
        return self.head(x)


def start(policy: Any, precision: str | None = None, make: Callable[[], nn.Module] = Model) -> tuple[Runtime, Any]:
    strategy = SingleDeviceStrategy(activation_checkpointing_policy=policy)
    runtime = Runtime(accelerator=ACCELERATOR, strategy=strategy, precision=precision)
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        model = make()
    return runtime, runtime.setup(model)


def trained(policy: Any, precision: str | None = None) -> dict[str, Tensor]:
    """Return the gradients and buffers after two steps, each of two micro-batches."""
    runtime, model = start(policy, precision)
    optimizer = runtime.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(2):
        optimizer.zero_grad()
        torch.manual_seed(step)
        # Two graphs live at once: the second forward changes buffers before the backward of the first.
        losses = [model(torch.randn(4, 8)).square().mean() for _ in range(2)]
        for loss in losses:
            runtime.backward(loss)
        optimizer.step()
    return {
        **{name: parameter.grad for name, parameter in model.named_parameters()},
        **dict(model.state_dict()),
        "random": torch.rand(3),
    }


@pytest.mark.parametrize("precision", [None, "bf16-mixed", "bf16-true", "64-true"])
def test_gradients_buffers_and_random_numbers_are_those_without_checkpointing(precision: str | None) -> None:
    expected, found = trained(None, precision), trained({Block}, precision)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_forward_runs_a_second_time_in_backward_only_with_gradients() -> None:
    runtime, model = start({Block})
    Block.runs = 0
    loss = model(torch.randn(4, 8)).mean()
    assert Block.runs == 2
    runtime.backward(loss)
    assert Block.runs == 4
    with torch.no_grad():
        model(torch.randn(4, 8))
    assert Block.runs == 6


def test_activations_inside_of_a_block_are_not_kept() -> None:
    def kept(policy: Any) -> int:
        sizes: list[int] = []
        _, model = start(policy)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
            model(torch.randn(4, 8))
        return sum(sizes)

    assert kept({Block}) < kept(None) / 3


def test_names_classes_and_signatures_stay() -> None:
    _, plain = start(None)
    _, model = start({Block})
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert type(model.blocks[0]) is Block
    assert inspect.signature(model.blocks[0].forward) == inspect.signature(plain.blocks[0].forward)


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        ("auto", {"blocks.0", "blocks.1"}),
        (Block, {"blocks.0", "blocks.1"}),
        ([nn.BatchNorm1d], {"blocks.0.norm", "blocks.1.norm"}),
        (lambda name, module: name.endswith("1"), {"blocks.1"}),
        (lambda name, module: not name, set()),
    ],
)
def test_a_policy_chooses_modules_without_the_root(policy: Any, chosen: set[str]) -> None:
    _, model = start(policy)
    assert {name for name, module in model.named_modules() if "forward" in vars(module)} == chosen


def test_a_graph_that_is_kept_can_be_used_twice() -> None:
    gradients = []
    for policy in (None, {Block}):
        runtime, model = start(policy)
        torch.manual_seed(1)
        loss = model(torch.randn(4, 8), scale=torch.ones(())).mean()
        loss.backward(retain_graph=True)
        torch.rand(7)
        runtime.backward(loss)
        gradients.append(model.blocks[0].up.weight.grad)
    assert torch.equal(*gradients)


def test_a_copy_runs_its_own_parameters() -> None:
    _, model = start({Block})
    clone = copy.deepcopy(model.module)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    clone(torch.randn(4, 8)).sum().backward()
    assert model.blocks[0].up.weight.grad is None
    assert clone.blocks[0].up.weight.grad is not None


def test_a_model_can_be_pickled() -> None:
    _, model = start({nn.Sequential}, make=lambda: nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh())))
    again = pickle.loads(pickle.dumps(model.module.eval()))
    x = torch.randn(4, 8)
    assert torch.equal(again(x), model(x))
    assert isinstance(vars(again[0])["forward"], CheckpointedForward)
    again(x).sum().backward()
    assert again[0][0].weight.grad is not None


def test_a_model_is_freed_with_its_last_reference() -> None:
    gc.collect()
    gc.disable()
    try:
        _, model = start({Block}, make=lambda: nn.Sequential(nn.Linear(8, 8), Block()))
        block = weakref.ref(model[1])
        model = None
        assert block() is None
    finally:
        gc.enable()


def test_a_forward_of_the_module_itself_is_kept() -> None:
    def make() -> nn.Module:
        model = Model()
        model.head.forward = lambda x: x.sum(1)  # type: ignore[method-assign]
        return model

    _, model = start({nn.Linear}, make=make)
    assert model(torch.randn(4, 8)).shape == (4,)


def test_blocks_of_torchs_wrapper_stay_as_they_are() -> None:
    _, model = start({Block}, make=lambda: nn.Sequential(checkpoint_wrapper(Block()), Block()))
    assert ["forward" in vars(block) for block in model.modules() if isinstance(block, Block)] == [False, True]


@cpu_only("the compiler does not know the simulated device")
def test_a_compiled_model_computes_the_same() -> None:
    outputs = []
    for policy in (None, {nn.Sequential}):
        runtime = Runtime(
            accelerator=ACCELERATOR, strategy=SingleDeviceStrategy(activation_checkpointing_policy=policy)
        )
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        made = nn.Sequential(inner, nn.Linear(8, 1))
        model = runtime.setup(torch.compile(made, backend="aot_eager"))
        runtime.backward(model(torch.ones(2, 8)).sum())
        outputs.append(made[0][0].weight.grad)
    torch.testing.assert_close(*outputs)


def test_a_policy_that_chooses_nothing_possible_is_refused_before_anything_changes() -> None:
    with pytest.raises(ConfigurationError, match=r"activation_checkpointing_policy='all' is not a policy"):
        SingleDeviceStrategy(activation_checkpointing_policy="all")
    with pytest.raises(ConfigurationError, match="activation_checkpointing_policy names Conv2d, but Model has none"):
        start({nn.Conv2d})
    with pytest.raises(ConfigurationError, match="chooses 0, a module of TorchScript"):
        start(lambda name, module: name == "0", make=lambda: nn.Sequential(_scripted()))


def _scripted() -> nn.Module:
    with torch.device(device()), pytest.warns(DeprecationWarning, match="torch.jit.script"):
        return torch.jit.script(nn.Linear(2, 2))
