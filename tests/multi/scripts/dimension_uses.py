"""Uses of dimensions on 4 ranks: refusals, a user's function, split losses, data axes, groups by axis."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from nucleate import Runtime
from nucleate.dimensions import FullyShard, TensorParallel
from nucleate.errors import ConfigurationError, RankDisagreementError
from nucleate.layout import whole_of
from nucleate.strategies import DDPStrategy, ModelParallelStrategy, Parallel
from tests.multi.device import accelerator, device
from tests.multi.scripts.dimensions import GPT, PLAN, batches, loss_of

PLAIN = {"0": "colwise", "2": "rowwise"}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def two_by_two(plan: Any = PLAIN, **options: Any) -> Runtime:
    dimensions = [FullyShard(), TensorParallel(plan, **options)]
    strategy = Parallel(mesh={"dp_shard": -1, "tp": 2}, dimensions=dimensions)
    runtime = Runtime(accelerator=accelerator(), strategy=strategy)
    runtime.launch()
    return runtime


def misfits_are_refused_before_anything_is_changed() -> None:
    model = mlp().to(device())
    before = copy.deepcopy(model.state_dict())
    for plan, message in (
        ({"first": "colwise"}, "matches no module"),
        ({"0": "fused_3"}, "is not a multiple of 6"),
        ({"1": "colwise"}, "which a ReLU cannot have"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            two_by_two(plan).setup(model)
    with pytest.raises(ConfigurationError, match="the mesh dp_shard=3 x tp=-1 does not fit 4 ranks"):
        Runtime(
            accelerator=accelerator(),
            strategy=Parallel(mesh={"dp_shard": 3, "tp": -1}, dimensions=[FullyShard(), TensorParallel(PLAIN)]),
        ).launch()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    runtime = two_by_two()
    assert runtime.layout(runtime.setup(model))["0.weight"].local_shape(0) == (4, 8)  # It can still be set up.
    mesh = runtime.strategy.device_mesh  # type: ignore[attr-defined]
    other = parallelize_module(mlp().to(device()), mesh["tp"], {"0": ColwiseParallel()})
    with pytest.raises(ConfigurationError, match=r"0\.weight, 0\.bias are DTensors.*Replicate\(\)"):
        Runtime(accelerator=accelerator(), strategy=DDPStrategy()).setup(other)


def a_module_that_needs_a_style_is_named_at_the_first_step() -> None:
    plan = {pattern: style for pattern, style in PLAN.items() if pattern != "blocks.*.head_norm"}
    runtime = two_by_two(plan)
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        plain = GPT()
    model, optimizer = runtime.setup(plain, torch.optim.AdamW(plain.parameters()))
    runtime.backward(loss_of(model(batches(1)[0][0]), batches(1)[0][1]))
    with pytest.raises(RankDisagreementError, match=r"gradients of blocks\.0\.head_norm\.weight.*'replicated'"):
        optimizer.step()


def a_function_lays_the_model_out() -> None:
    seen = []

    def parallelize(model: nn.Sequential, mesh: Any) -> nn.Sequential:
        seen.append((mesh["data_parallel"].size(), mesh["tensor_parallel"].size(), mesh["tp"].size(), mesh.size()))
        parallelize_module(model, mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return fully_shard(model, mesh=mesh["data_parallel"])

    torch.manual_seed(0)
    plain = mlp().to(device())
    runtime = Runtime(
        accelerator=accelerator(),
        strategy=ModelParallelStrategy(parallelize, data_parallel_size=2, tensor_parallel_size=2),
        verify="all",
    )
    runtime.launch()
    torch.manual_seed(runtime.global_rank)
    with runtime.init_module(empty_init=True):
        model = mlp()
    model = runtime.setup(model)
    assert seen == [(2, 2, 2, 4)]
    assert runtime.layout(model)["0.weight"].mesh.axes == ("dp_shard", "tp")
    assert (runtime.strategy.data_parallel_size, runtime.strategy.data_parallel_rank) == (2, runtime.global_rank // 2)
    for name, value in plain.state_dict().items():
        assert torch.equal(whole_of(model.state_dict()[name]), value), name
    optimizer = runtime.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    train_beside(runtime, model, optimizer, plain)


def train_beside(runtime: Runtime, model: Any, optimizer: Any, plain: nn.Module) -> None:
    """Train on the loader's batches, and the plain model on those of all data ranks."""
    samples = torch.randn(16, 8, generator=torch.Generator("cpu").manual_seed(5), device="cpu")
    dataset = torch.utils.data.TensorDataset(samples)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2)
    own = runtime.setup_dataloaders(loader)
    of_plain = torch.optim.SGD(plain.parameters(), lr=0.1)
    rows = []
    for (batch,) in own:
        # The ranks of a group of tensor parallel have the same batch.
        assert torch.equal(runtime.all_gather(batch, group="tp")[0], batch)
        both = runtime.all_gather(batch, group="data")
        assert not torch.equal(both[0], both[1])
        loss = model(batch).square().mean()
        runtime.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        plain(both.flatten(0, 1)).square().mean().backward()  # type: ignore[no-untyped-call]
        of_plain.step()
        of_plain.zero_grad()
        rows.append(runtime.gather_for_metrics(batch))
    assert sorted(torch.cat(rows)[:, 0].tolist()) == sorted(samples[:, 0].tolist())
    for name, value in plain.state_dict().items():
        assert torch.allclose(whole_of(model.state_dict()[name]), value, atol=1e-6), name


def a_loss_of_split_logits_is_eagers() -> None:
    torch.manual_seed(0)
    with torch.device(device()):
        plain = GPT(tied=False)
    plain.scale.requires_grad_(False)
    runtime = two_by_two(PLAN, loss_parallel=True)
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        model = GPT(tied=False)
    model.forward = lambda tokens: plain_logits(model, tokens)  # type: ignore[method-assign]
    wrapped = runtime.setup(model)
    inputs, targets = batches(1)[0]
    mine = slice(runtime.strategy.data_parallel_rank, None, 2)
    loss = runtime.forward_backward(wrapped, (inputs[mine], targets[mine]), loss_of)
    expected = loss_of(plain_logits(plain, inputs[mine]), targets[mine])
    assert torch.allclose(whole_of(loss), expected, atol=1e-6)
    expected_whole = loss_of(plain_logits(plain, inputs), targets)
    expected_whole.backward()  # type: ignore[no-untyped-call]
    gradient = whole_of(wrapped.head.weight.grad)
    assert torch.allclose(gradient, plain.head.weight.grad, atol=1e-6)


def plain_logits(model: GPT, tokens: Tensor) -> Tensor:
    x = model.embed(tokens)
    for block in model.blocks:
        x = block(x)
    logits: Tensor = model.head(model.norm(x))
    return logits


def groups_go_by_the_names_of_axes() -> None:
    runtime = two_by_two()
    rank = runtime.global_rank
    assert runtime.all_reduce(float(rank), group="tp", reduce_op="sum") == (1.0 if rank < 2 else 5.0)
    assert runtime.all_gather(torch.tensor(rank), group="dp_shard").tolist() == [rank % 2, rank % 2 + 2]
    assert runtime.all_reduce(rank, reduce_op="sum") == 6
    with pytest.raises(ConfigurationError, match="group is 'pp'; it must be.*the name of an axis"):
        runtime.all_reduce(1.0, group="pp")
    assert F.relu is not None
    assert dist.get_world_size() == 4


misfits_are_refused_before_anything_is_changed()
a_module_that_needs_a_style_is_named_at_the_first_step()
a_function_lays_the_model_out()
a_loss_of_split_logits_is_eagers()
groups_go_by_the_names_of_axes()
print("done")
