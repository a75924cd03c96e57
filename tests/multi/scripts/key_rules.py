"""What rules on keys promise across ranks, checked on every rank of a real group; run by test_key_rules.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nucleate import Runtime
from nucleate.checkpoint import concatenate, inverse, open_checkpoint, permute_heads, stack, transpose
from nucleate.checkpoint.rules.rule import Rule
from nucleate.checkpoint.stored import data_file
from nucleate.cluster import process_group
from nucleate.errors import CheckpointError, CheckpointKeyError, RankFailedError
from nucleate.strategies import DDPStrategy, FSDPStrategy, Strategy
from tests.multi.device import accelerator

ROWS, COLUMNS = 256, 512


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(COLUMNS, ROWS * 2)
        self.up = nn.Linear(COLUMNS, ROWS, bias=False)
        self.rotated = nn.Linear(COLUMNS, ROWS, bias=False)
        self.experts = nn.Parameter(torch.randn(6, 8, COLUMNS))


RULES: list[Rule] = [
    concatenate([f"{part}.{{kind}}" for part in "qkv"], "qkv.{kind}", sizes=[2, 1, 1], groups=4),
    transpose("up.weight"),
    permute_heads("rotated.weight", num_heads=8),
    stack("experts.*", "experts"),
]


def stored() -> dict[str, Tensor]:
    torch.manual_seed(3)
    found: dict[str, Tensor] = {}
    for part, rows in (("q", ROWS), ("k", ROWS // 2), ("v", ROWS // 2)):
        found[f"{part}.weight"], found[f"{part}.bias"] = torch.randn(rows, COLUMNS), torch.randn(rows)
    found["up.weight"] = torch.randn(COLUMNS, ROWS)
    found["rotated.weight"] = torch.randn(ROWS, COLUMNS)
    for number in range(6):
        found[f"experts.{number}"] = torch.randn(8, COLUMNS)
    return found


def expected() -> dict[str, Tensor]:
    file, found = stored(), {}
    for kind in ("weight", "bias"):
        parts = [file[f"{part}.{kind}"].chunk(4) for part in "qkv"]
        found[f"qkv.{kind}"] = torch.cat([part[group] for group in range(4) for part in parts])
    found["up.weight"] = file["up.weight"].t()
    found["rotated.weight"] = file["rotated.weight"].view(8, 16, 2, COLUMNS).transpose(1, 2).reshape(ROWS, COLUMNS)
    found["experts"] = torch.stack([file[f"experts.{number}"] for number in range(6)])
    return found


def strategies() -> Iterator[Strategy]:
    yield DDPStrategy()
    yield FSDPStrategy()
    yield FSDPStrategy(wrap=(nn.Linear,))


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }


def owned_bytes(model: nn.Module) -> int:
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() * p.element_size() for p in model.parameters())


@contextmanager
def counted() -> Iterator[list[int]]:
    sizes: list[int] = []
    real = data_file.DataFile.read_into

    def read_into(self: Any, address: int, size_bytes: int, offset: int) -> None:
        sizes.append(size_bytes)
        real(self, address, size_bytes, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_file.DataFile, "read_into", read_into)
        yield sizes


def assert_loaded(model: nn.Module) -> None:
    state, wanted = whole(model), expected()
    assert state.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(state[name], wanted[name]), name


def a_deferred_model_reads_on_each_rank_what_it_owns_and_no_more(path: Path) -> None:
    for strategy in strategies():
        runtime = Runtime(accelerator=accelerator(), strategy=strategy)
        with runtime.init_module(empty_init=True):
            model = Fused()
        with counted() as sizes:
            assert runtime.load_raw(path / "model.safetensors", model, keys=RULES).is_exact
            assert sum(sizes) == 0
            wrapped = runtime.setup(model)
        assert sum(sizes) == owned_bytes(wrapped.module)
        assert_loaded(wrapped.module)


def a_model_that_is_set_up_reads_on_each_rank_what_it_owns_and_no_more(path: Path) -> None:
    for strategy in strategies():
        runtime = Runtime(accelerator=accelerator(), strategy=strategy)
        wrapped = runtime.setup(Fused())
        with counted() as sizes:
            assert runtime.load_raw(path / "model.safetensors", wrapped, keys=RULES).is_exact
        assert sum(sizes) == owned_bytes(wrapped.module)
        assert_loaded(wrapped.module)


def what_every_rank_saves_of_its_own_is_the_file_that_it_was(path: Path) -> None:
    for number, strategy in enumerate(strategies()):
        runtime = Runtime(accelerator=accelerator(), strategy=strategy)
        with runtime.init_module(empty_init=True):
            model = Fused()
        runtime.load_raw(path / "model.safetensors", model, keys=RULES)
        wrapped = runtime.setup(model)
        for target, asynchronous in (("a.safetensors", False), ("a.pt", False), ("folder", True)):
            place = path / f"{number}{target}"
            format = "safetensors" if target == "folder" else None
            handle = runtime.save(place, wrapped, format=format, keys=inverse(RULES), asynchronous=asynchronous)
            if handle is not None:
                handle.wait()
            runtime.barrier()
            contents = open_checkpoint(place)
            assert set(contents.tensors) == set(stored())
            for name, tensor in stored().items():
                found = torch.empty(tensor.shape)
                contents.tensors[name].read(0, found.view(-1))
                assert torch.equal(found, tensor), (strategy, target, name)


def a_dcp_folder_takes_rows_and_refuses_what_would_be_many_small_boxes(path: Path) -> None:
    runtime = Runtime(accelerator=accelerator(), strategy=FSDPStrategy())
    wrapped = runtime.setup(Fused())
    rows = [rule for rule in inverse(RULES) if "split" in str(rule) or "unstack" in str(rule)]
    runtime.save(path / "dcp", wrapped, keys=rows)
    contents, state = open_checkpoint(path / "dcp"), whole(wrapped.module)
    for name, wanted in (
        ("q.weight", torch.cat([group[: ROWS // 4] for group in state["qkv.weight"].chunk(4)])),
        ("experts.5", state["experts"][5]),
    ):
        found = torch.empty(wanted.shape)
        contents.tensors[name].read(0, found.view(-1))
        assert torch.equal(found, wanted)
    with pytest.raises(CheckpointError, match="many small ones in up.weight"):
        runtime.save(path / "refused", wrapped, keys=transpose("up.weight"))
    runtime.barrier()
    assert not (path / "refused").exists()


def an_error_is_raised_on_every_rank_with_nothing_changed(path: Path) -> None:
    runtime = Runtime(accelerator=accelerator(), strategy=FSDPStrategy())
    wrapped = runtime.setup(Fused())
    before = {name: tensor.clone() for name, tensor in whole(wrapped.module).items()}
    with pytest.raises(CheckpointKeyError, match="finds nothing"):
        runtime.load_raw(path / "model.safetensors", wrapped, keys=transpose("nothing"))
    keys = RULES if runtime.global_rank else [*RULES, transpose("nothing")]
    with pytest.raises((CheckpointKeyError, RankFailedError), match="finds nothing"):
        runtime.load_raw(path / "model.safetensors", wrapped, keys=keys)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole(wrapped.module).items())


CHECKS: list[Callable[[Path], None]] = [
    a_deferred_model_reads_on_each_rank_what_it_owns_and_no_more,
    a_model_that_is_set_up_reads_on_each_rank_what_it_owns_and_no_more,
    what_every_rank_saves_of_its_own_is_the_file_that_it_was,
    a_dcp_folder_takes_rows_and_refuses_what_would_be_many_small_boxes,
    an_error_is_raised_on_every_rank_with_nothing_changed,
]


def main(path: Path) -> None:
    runtime = Runtime(accelerator=accelerator(), strategy="ddp")
    runtime.launch()
    try:
        if runtime.is_global_zero:
            save_file(stored(), path / "model.safetensors")
        dist.barrier()
        for check in CHECKS:
            check(path)
            runtime.barrier()
            # In one piece: ranks share the pipe.
            os.write(1, f"{check.__name__}\n".encode())
    finally:
        process_group.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
