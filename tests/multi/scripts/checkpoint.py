"""What checkpoints promise across ranks, checked on every rank of a real group; run by test_checkpoint.py."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial

from nucleate.checkpoint import load, load_raw, loader, raw_loader, save
from nucleate.checkpoint.readers import open_saved
from nucleate.cluster import Communicator, Environment
from nucleate.errors import (
    CheckpointError,
    CheckpointKeyError,
    NucleateError,
    RankDisagreementError,
    RankFailedError,
    ShapeMismatchError,
)
from tests.multi.checks import run_checks
from tests.multi.device import ACCELERATOR, device, equal, start_group

Optimizer = torch.optim.Optimizer


class Model(nn.Module):
    """Odd sizes, fewer rows than ranks, a tie, buffers, a bare parameter, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 6))
        self.single = nn.Parameter(torch.randn(1, 6))
        self.frozen = nn.Parameter(torch.randn(3, 6), requires_grad=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)) + self.single + self.frozen.sum(0))


def plain(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def sharded(seed: int = 0) -> Model:
    model = plain(seed)
    fully_shard(model.body)
    return fully_shard(model)


def hybrid(seed: int = 0) -> Model:
    mesh = init_device_mesh(ACCELERATOR, (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    model = plain(seed)
    fully_shard(model.body, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module, optimizer: Optimizer, steps: int, seed: int) -> list[float]:
    generator = torch.Generator(device()).manual_seed(seed + 100 * dist.get_rank())
    losses = []
    for _ in range(steps):
        tokens = torch.randint(11, (8,), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens), tokens)
        optimizer.zero_grad()
        loss.backward()
        if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            for parameter in model.parameters():  # what DDP does
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(tensor) for name, tensor in model.state_dict().items()}


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(parameter.detach()) for name, parameter in model.named_parameters()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not equal(left[name], right[name])] == []


def resumes_exactly(
    comm: Communicator, path: Path, build: Callable[[int], nn.Module], make: Callable[[Any], Optimizer], warm: bool
) -> None:
    model = build(0)
    optimizer = make(model.parameters())
    train(model, optimizer, 3, seed=1)
    save(path, {"model": model, "optimizer": optimizer, "step": 3}, comm)
    saved = parameters(model)
    expected = train(model, optimizer, 3, seed=2)

    other = build(1)
    resumed = make(other.parameters())
    if warm:
        train(other, resumed, 1, seed=3)
    state: dict[str, Any] = {"model": other, "optimizer": resumed, "step": 0}
    assert load(path, state, comm) == {}
    assert state["step"] == 3
    assert_same(parameters(other), saved)
    assert other.head.weight is other.embed.weight
    assert train(other, resumed, 3, seed=2) == expected
    assert_same(parameters(other), parameters(model))


def adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05)


def replicated_models_resume_exactly(comm: Communicator, path: Path) -> None:
    resumes_exactly(comm, path / "fresh", plain, adamw, warm=False)
    resumes_exactly(comm, path / "warm", plain, adamw, warm=True)


def sharded_models_resume_exactly(comm: Communicator, path: Path) -> None:
    resumes_exactly(comm, path / "fresh", sharded, adamw, warm=False)
    resumes_exactly(comm, path / "warm", sharded, adamw, warm=True)


def sharded_models_resume_exactly_with_every_optimizer(comm: Communicator, path: Path) -> None:
    def momentum(parameters: Any) -> Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    def fused(parameters: Any) -> Optimizer:
        return torch.optim.AdamW(parameters, lr=torch.tensor(0.05), fused=True)

    for make in (momentum, fused, torch.optim.Adagrad):
        resumes_exactly(comm, path / make.__name__, sharded, make, warm=False)


def hybrid_sharded_models_resume_exactly(comm: Communicator, path: Path) -> None:
    if comm.world_size % 2 == 0 and comm.world_size > 2:
        resumes_exactly(comm, path / "hybrid", hybrid, adamw, warm=False)


def a_resumed_sharded_optimizer_has_the_layout_that_a_step_would_have_made(comm: Communicator, path: Path) -> None:
    model = sharded()
    optimizer = adamw(model.parameters())
    train(model, optimizer, 1, seed=1)
    save(path / "c", {"model": model, "optimizer": optimizer}, comm)
    resumed = adamw(model.parameters())
    load(path / "c", {"model": model, "optimizer": resumed}, comm)
    assert optimizer.state.keys() == resumed.state.keys()
    for parameter in optimizer.state:
        for name, tensor in optimizer.state[parameter].items():
            back = resumed.state[parameter][name]
            assert type(back) is type(tensor)
            assert (back.dtype, back.device, back.shape) == (tensor.dtype, tensor.device, tensor.shape)
            if isinstance(tensor, DTensor):
                assert back.placements == tensor.placements
                assert torch.equal(back.to_local(), tensor.to_local())
            else:
                assert torch.equal(back, tensor)


def one_format_serves_every_layout(comm: Communicator, path: Path) -> None:
    layouts: dict[str, Callable[[int], nn.Module]] = {"plain": plain, "sharded": sharded}
    if comm.world_size == 4:
        layouts["hybrid"] = hybrid
    for source, build in layouts.items():
        model = build(0)
        optimizer = adamw(model.parameters())
        train(model, optimizer, 2, seed=1)
        save(path / source, {"model": model, "optimizer": optimizer}, comm)
        moments = {
            name: full(optimizer.state[parameter]["exp_avg"])
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        for rebuild in layouts.values():
            other = rebuild(1)
            resumed = adamw(other.parameters())
            load(path / source, {"model": other, "optimizer": resumed}, comm)
            assert_same(parameters(other), parameters(model))
            back = {
                name: full(resumed.state[parameter]["exp_avg"])
                for name, parameter in other.named_parameters()
                if parameter.requires_grad
            }
            assert_same(back, moments)
        alone = Communicator(Environment(), device())
        single = plain(2)
        load(path / source, {"model": single}, alone, remainder=False)
        assert_same(parameters(single), parameters(model))


def buffers_and_tensors_that_differ_are_rank_zeros(comm: Communicator, path: Path) -> None:
    model = plain()
    with torch.no_grad():
        model.body[1].running_mean.fill_(comm.rank)
    save(path / "c", {"model": model, "tensor": torch.tensor(comm.rank)}, comm)
    rest = load(path / "c", {"model": model}, comm)
    assert model.body[1].running_mean.eq(0).all()
    assert rest["tensor"] == 0


def the_remainder_is_whole_on_every_rank(comm: Communicator, path: Path) -> None:
    model = sharded()
    save(path / "c", {"model": model}, comm)
    rest = load(path / "c", None, comm)
    assert_same(rest["model"], whole(model))


def objects_may_hold_sharded_tensors_and_gather(comm: Communicator, path: Path) -> None:
    class Average:
        def __init__(self, model: nn.Module) -> None:
            self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
            self.ranks: list[int] = []

        def state_dict(self) -> dict[str, Any]:
            return {"shadow": self.shadow, "ranks": comm.gather_objects(comm.rank)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.shadow, self.ranks = state["shadow"], state["ranks"]

    saved, other = Average(sharded(0)), Average(sharded(1))
    save(path / "c", {"average": saved}, comm)
    load(path / "c", {"average": other}, comm)
    assert other.ranks == list(range(comm.world_size))
    assert all(isinstance(tensor, DTensor) for tensor in other.shadow.values())
    assert all(torch.equal(saved.shadow[key].to_local(), other.shadow[key].to_local()) for key in saved.shadow)


def rank_zeros_path_counts(comm: Communicator, path: Path) -> None:
    save(path / f"from-{comm.rank}", {"a": 1}, comm)
    assert os.listdir(path) == ["from-0"]
    assert load(path / f"from-{comm.rank}", None, comm) == {"a": 1}


def what_does_not_fit_is_refused_on_every_rank_before_anything_changes(comm: Communicator, path: Path) -> None:
    save(path / "c", {"model": sharded(0)}, comm)
    model = sharded(1)
    before = whole(model)
    with pytest.raises(CheckpointKeyError, match="1 missing in the checkpoint: extra"):
        load(path / "c", {"model": model, "extra": torch.ones(1)}, comm)
    save(path / "d", {"model": nn.ParameterDict({"single": nn.Parameter(torch.ones(1, 6))})}, comm)
    wrong = fully_shard(nn.ParameterDict({"single": nn.Parameter(torch.ones(1, 5))}))
    with pytest.raises(ShapeMismatchError, match=r"model\.single is \(1, 5\) here but \(1, 6\) in the checkpoint"):
        load(path / "d", {"model": wrong}, comm)
    assert_same(whole(model), before)


def fails_everywhere(comm: Communicator, path: Path, act: Callable[[], object], kind: type[Exception]) -> None:
    """Check that `act` raises `kind` on rank 1 and an error of ours elsewhere, and that a checkpoint survives it."""
    save(path, {"number": 1, "t": torch.ones(2)}, comm)
    with pytest.raises((NucleateError, kind)) as caught:
        act()
    assert isinstance(
        caught.value, kind if comm.rank == 1 else (RankFailedError, CheckpointError, RankDisagreementError)
    )
    comm.barrier()
    assert os.listdir(path.parent) == [path.name]
    assert load(path, None, comm)["number"] == 1


def a_checkpoint_that_is_replaced_between_two_ranks_is_refused_everywhere(comm: Communicator, path: Path) -> None:
    alone = Communicator(Environment(), device())
    for number, (name, format) in enumerate([("c", "dcp"), ("c", "safetensors"), ("c.pt", None)]):
        place = path / str(number) / name
        save(place, {"number": 1, "t": torch.ones(2)}, comm, format=format)

        def late(*args: Any, place: Path = place, format: str | None = format, **kwargs: Any) -> Any:
            if comm.rank == 1:
                save(place, {"number": 2, "t": torch.zeros(2)}, alone, format=format)
            return open_saved(*args, **kwargs)

        for module in (loader, raw_loader):
            act: Callable[[], object] = lambda place=place: load(place, None, comm)  # noqa: E731
            if module is raw_loader:
                act = lambda place=place: load_raw(place, nn.ParameterDict({"t": torch.ones(2)}), comm)  # noqa: E731
            with (
                mock.patch.object(module, "open_saved", late),
                pytest.raises((CheckpointError, RankFailedError), match="was replaced while it was read"),
            ):
                act()
        comm.barrier()
        assert load(place, None, comm)["number"] == 2


def a_state_dict_that_fails_on_one_rank_fails_everywhere(comm: Communicator, path: Path) -> None:
    model = plain()
    if comm.rank == 1:
        model.state_dict = mock.Mock(side_effect=ZeroDivisionError)  # type: ignore[method-assign]
    after = mock.Mock(state_dict=lambda: {"ranks": comm.gather_objects(comm.rank)})
    fails_everywhere(
        comm, path / "c", lambda: save(path / "c", {"model": model, "after": after}, comm), ZeroDivisionError
    )


def a_disk_that_fails_on_one_rank_fails_everywhere(comm: Communicator, path: Path) -> None:
    def act() -> None:
        failure = OSError(28, "No space left on device") if comm.rank == 1 else None
        stream = mock.patch.object(FileSystem, "create_stream", side_effect=failure) if failure else mock.MagicMock()
        with stream:
            save(path / "c", {"model": model}, comm)

    model = sharded()
    fails_everywhere(comm, path / "c", act, CheckpointError)


def states_that_differ_are_refused_everywhere(comm: Communicator, path: Path) -> None:
    model = plain()
    state = {"model": model, "step": 1} if comm.rank == 0 else {"step": 1, "model": model}
    fails_everywhere(comm, path / "save" / "c", lambda: save(path / "save" / "c", state, comm), RankDisagreementError)
    fails_everywhere(comm, path / "load" / "c", lambda: load(path / "load" / "c", state, comm), RankDisagreementError)


def options_that_differ_are_refused_everywhere(comm: Communicator, path: Path) -> None:
    model = plain()
    for number, options in enumerate(({"format": "safetensors"}, {"asynchronous": True}, {"keep_last": 2})):
        mine: dict[str, Any] = dict(options) if comm.rank == 1 else {}
        place = path / str(number) / "c"
        fails_everywhere(
            comm,
            place,
            lambda place=place, mine=mine: save(place, {"model": model}, comm, **mine),
            RankDisagreementError,
        )


def state_of_one_rank_alone_is_refused(comm: Communicator, path: Path) -> None:
    model = sharded()
    optimizer = adamw(model.parameters())
    parameter = model.body[0].weight
    optimizer.state[parameter] = {"ef": torch.zeros_like(parameter.to_local())}
    with pytest.raises(NucleateError, match=r"model\.body\.0\.weight\.ef is a plain tensor"):
        save(path / "c", {"model": model, "optimizer": optimizer}, comm)


class Factored(torch.optim.Optimizer):
    """Keeps one number for each row, as Adafactor does; torch's own fails on sharded parameters in 2.13."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.ndim == 2:
                    rows = parameter.grad.square().mean(-1)
                    state = self.state[parameter]
                    state["rows"] = rows if "rows" not in state else 0.5 * state["rows"] + 0.5 * rows
                    parameter -= 0.1 * parameter.grad / (state["rows"].sqrt()[:, None] + 1e-3)


def optimizers_with_factored_state_resume_exactly(comm: Communicator, path: Path) -> None:
    resumes_exactly(comm, path / "c", sharded, Factored, warm=False)
    resumes_exactly(comm, path / "c", sharded, Factored, warm=True)


def a_tensor_that_is_not_reduced_is_refused(comm: Communicator, path: Path) -> None:
    mesh = init_device_mesh(ACCELERATOR, (comm.world_size,))
    partial = DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False)
    with pytest.raises(CheckpointError, match=r"loss is a DTensor that is not reduced"):
        save(path / "c", {"loss": partial}, comm)


CHECKS: list[Callable[[Communicator, Path], None]] = [
    replicated_models_resume_exactly,
    sharded_models_resume_exactly,
    sharded_models_resume_exactly_with_every_optimizer,
    hybrid_sharded_models_resume_exactly,
    a_resumed_sharded_optimizer_has_the_layout_that_a_step_would_have_made,
    one_format_serves_every_layout,
    buffers_and_tensors_that_differ_are_rank_zeros,
    the_remainder_is_whole_on_every_rank,
    objects_may_hold_sharded_tensors_and_gather,
    rank_zeros_path_counts,
    what_does_not_fit_is_refused_on_every_rank_before_anything_changes,
    a_checkpoint_that_is_replaced_between_two_ranks_is_refused_everywhere,
    a_state_dict_that_fails_on_one_rank_fails_everywhere,
    a_disk_that_fails_on_one_rank_fails_everywhere,
    states_that_differ_are_refused_everywhere,
    options_that_differ_are_refused_everywhere,
    state_of_one_rank_alone_is_refused,
    optimizers_with_factored_state_resume_exactly,
    a_tensor_that_is_not_reduced_is_refused,
]


def killed(comm: Communicator, path: Path) -> None:
    """Save once, then again with one rank killed when its file is written but not yet on disk."""
    save(path, {"model": sharded(0), "number": 1}, comm)
    if comm.rank == int(sys.argv[3]):
        mock.patch("os.fsync", side_effect=lambda _: os.kill(os.getpid(), signal.SIGKILL)).start()
    save(path, {"model": sharded(1), "number": 2}, comm)


def survived(comm: Communicator, path: Path) -> None:
    """Find what the killed run had saved first, and save over what it left."""
    model = sharded(2)
    assert load(path, {"model": model}, comm)["number"] == 1
    assert_same(parameters(model), parameters(sharded(0)))
    save(path, {"model": model, "number": 3}, comm)
    assert os.listdir(path.parent) == [path.name]


if __name__ == "__main__":
    warnings.simplefilter("error")
    communicator = start_group()
    command, folder = sys.argv[1], Path(sys.argv[2])
    if command == "checks":
        run_checks(CHECKS, communicator, folder)
    else:
        {"killed": killed, "survived": survived}[command](communicator, folder / "last")
