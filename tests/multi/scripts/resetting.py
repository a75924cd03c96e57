"""Tensors without a recipe on several ranks: the bits are those of the calls made by hand, and no rank waits in vain.

Arguments: the names of strategies to try.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nucleate import Runtime
from nucleate.cluster import Communicator
from nucleate.errors import NucleateError, RankDisagreementError, RankFailedError, UninitializedError
from tests.by_hand import made_by_hand
from tests.deferred.equality import bits, named_tensors
from tests.multi.device import accelerator
from tests.multi.exactness import make_strategy, whole

SEED = 77


class Block(nn.Module):
    """A parameter that only `reset_parameters` fills, among others."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.gate = nn.Parameter(torch.empty(16, 9))
        self.register_buffer("table", torch.empty(5))

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.gate, std=0.6, a=-1, b=1)
        nn.init.orthogonal_(self.linear.weight)
        with torch.no_grad():
            self.table.copy_(torch.arange(5).exp() * torch.rand(()).item())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 16, padding_idx=1)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.attention = nn.MultiheadAttention(16, 4)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 23, bias=False)
        self.head.weight = self.embed.weight


def compare(runtime: Runtime, model: nn.Module, expected: nn.Module, after: torch.Tensor) -> None:
    assert torch.equal(torch.rand(5), after), "the random stream is elsewhere"
    actual = named_tensors(model)
    for name, tensor in named_tensors(expected).items():
        assert bits(tensor) == bits(whole(actual[name])), f"{name} differs"
    assert actual["head.weight"] is actual["embed.weight"]


def built_on_meta(runtime: Runtime, folder: Path) -> None:
    expected = made_by_hand(Model, SEED)
    after = torch.rand(5)
    # As if every rank had drawn other numbers before; rank 0's count.
    torch.manual_seed(SEED + 1000 * runtime.global_rank)
    with torch.device("meta"):
        model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    runtime.setup(model, optimizer)
    compare(runtime, model, expected, after)


def left_empty(runtime: Runtime, folder: Path) -> None:
    torch.manual_seed(SEED)
    expected = Model()
    for block in expected.blocks:
        block.reset_parameters()  # type: ignore[operator]
    after = torch.rand(5)
    torch.manual_seed(SEED)
    kept = {f"blocks.{i}.linear.weight": block.linear.weight for i, block in enumerate(Model().blocks)}
    torch.manual_seed(SEED + 1000 * runtime.global_rank)
    with runtime.init_module(empty_init=True):
        model = Model()
    runtime.setup(model)
    # What the constructor gave a value keeps it.
    with torch.no_grad():
        for name, value in kept.items():
            expected.get_parameter(name).copy_(value)
    compare(runtime, model, expected, after)


def partly_loaded(runtime: Runtime, folder: Path) -> None:
    # Their modules hold other tensors as well, so that each is called.
    stored = {"blocks.1.linear.weight": torch.full((16, 16), 2.0), "blocks.2.table": torch.ones(5)}
    if runtime.is_global_zero:
        save_file(stored, folder / "part.safetensors")
    runtime.barrier()
    expected = made_by_hand(Model, SEED)
    after = torch.rand(5)
    torch.manual_seed(SEED + 1000 * runtime.global_rank)
    with torch.device("meta"):
        model = Model()
    if runtime.is_global_zero:
        with pytest.warns(UserWarning, match="not in it"):
            runtime.load_raw(folder / "part.safetensors", model, strict=False)
    else:
        runtime.load_raw(folder / "part.safetensors", model, strict=False)
    runtime.setup(model)
    expected.load_state_dict(stored, strict=False)
    compare(runtime, model, expected, after)


def refused(runtime: Runtime, model: nn.Module, error: type[NucleateError], message: str) -> None:
    with pytest.raises((error, RankFailedError), match=message):
        runtime.setup(model)


def one_rank_built_another_model(runtime: Runtime, folder: Path) -> None:
    with torch.device("cpu" if runtime.global_rank == 1 else "meta"):
        model = nn.Linear(4, 4)
    refused(runtime, model, RankDisagreementError, r"without a recipe is 'weight, bias' on rank 0 but '' on rank 1")


def one_rank_fails(runtime: Runtime, folder: Path) -> None:
    class Failing(Block):
        def reset_parameters(self) -> None:
            if runtime.global_rank == 1:
                raise ValueError("only here")
            super().reset_parameters()

    with torch.device("meta"):
        model = Failing()
    refused(runtime, model, UninitializedError, r"Failing\.reset_parameters\(\) failed.*ValueError: only here")


def one_rank_draws_other_numbers(runtime: Runtime, folder: Path) -> None:
    class Odd(Block):
        def reset_parameters(self) -> None:
            torch.rand(1 + runtime.global_rank)
            super().reset_parameters()

    with torch.device("meta"):
        model = Odd()
    refused(runtime, model, RankDisagreementError, "constructed another model")


def a_model_that_needs_no_call_costs_no_exchange(runtime: Runtime, folder: Path) -> None:
    with runtime.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    torch.manual_seed(SEED + runtime.global_rank)
    state = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(Communicator, "broadcast")
        runtime.setup(model)
    assert torch.equal(torch.get_rng_state(), state)


def nothing_to_call(runtime: Runtime, folder: Path) -> None:
    with runtime.init_module(empty_init=True):
        model = nn.Module()
        model.left = nn.Parameter(torch.empty(4))
    refused(runtime, model, UninitializedError, r"initializes left: .*Add `def reset_parameters\(self\)` to Module")


CHECKS: tuple[Callable[[Runtime, Path], None], ...] = (
    built_on_meta, left_empty, partly_loaded,
    one_rank_built_another_model, one_rank_fails, one_rank_draws_other_numbers, nothing_to_call,
    a_model_that_needs_no_call_costs_no_exchange,
)  # fmt: skip


def main() -> None:
    for name in sys.argv[1:]:
        for check in CHECKS:
            runtime = Runtime(accelerator=accelerator(), strategy=make_strategy(name))
            folder = Path(runtime.broadcast(tempfile.mkdtemp()))
            check(runtime, folder)
        sys.stdout.write(f"{name} holds\n")


if __name__ == "__main__":
    main()
