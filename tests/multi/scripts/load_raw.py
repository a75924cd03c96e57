"""What `load_raw` promises across ranks, checked on every rank of a real group; run by test_load_raw.py."""

from __future__ import annotations

import os
import sys
import time
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
from nucleate.checkpoint import raw_loader
from nucleate.checkpoint.stored import data_file
from nucleate.cluster import process_group
from nucleate.errors import CheckpointError, CheckpointKeyError, RankDisagreementError, RankFailedError
from nucleate.strategies import DDPStrategy, FSDPStrategy, Strategy
from tests.checkpoint import test_own_ways as own_ways
from tests.multi.device import accelerator


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 32)) for _ in "ab")
        self.single = nn.Parameter(torch.randn(1, 3))
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.randn(4))


def stored(seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    found = {name: tensor.detach().clone() for name, tensor in Model().state_dict().items()}
    del found["head.weight"]
    return found


def strategies() -> Iterator[tuple[str, Strategy]]:
    yield "ddp", DDPStrategy()
    yield "fsdp", FSDPStrategy()
    yield "linear", FSDPStrategy(wrap=(nn.Linear,))
    if dist.get_world_size() == 4:
        yield "hsdp", FSDPStrategy(num_replicas=2)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }


def owned_bytes(model: nn.Module) -> int:
    """Return how many bytes of the model's tensors this rank holds, tied ones once."""
    local = {id(t): t.to_local() if isinstance(t, DTensor) else t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in local.values())


@contextmanager
def counted() -> Iterator[list[int]]:
    read: list[int] = []
    plain = data_file.DataFile.read_into

    def count(self: data_file.DataFile, address: int, size_bytes: int, offset: int) -> None:
        read.append(size_bytes)
        plain(self, address, size_bytes, offset)

    data_file.DataFile.read_into = count  # type: ignore[method-assign]
    try:
        yield read
    finally:
        data_file.DataFile.read_into = plain  # type: ignore[method-assign]


def make(runtime: Runtime, path: Path, when: str, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(7 + runtime.global_rank)
    with runtime.init_module(empty_init=True):
        model = Model()
    if when == "before":
        report = runtime.load_raw(path, model, **options)
        return runtime.setup(model), report
    wrapped = runtime.setup(model)
    return wrapped, runtime.load_raw(path, wrapped, **options)


def each_rank_reads_what_it_owns_and_no_more(path: Path) -> None:
    for when in ("before", "after"):
        for _, strategy in strategies():
            runtime = Runtime(accelerator=accelerator(), strategy=strategy)
            with counted() as read:
                model, report = make(runtime, path / "model.safetensors", when)
            tensors = whole(model)
            expected = stored()
            assert all(torch.equal(tensors[name], value) for name, value in expected.items())
            assert model.head.weight is model.embed.weight
            assert sum(read) == owned_bytes(model)
            assert report.is_exact
            assert [one.key for one in report.tied] == ["head.weight"]


def what_is_missing_is_eagers_with_rank_0s_seed(path: Path) -> None:
    torch.manual_seed(7)
    eager = Model().state_dict()
    for name, strategy in strategies():
        runtime = Runtime(accelerator=accelerator(), strategy=strategy)
        with warns_on_rank_0(name):
            model, report = make(runtime, path / "half.safetensors", "before", strict=False)
        tensors = whole(model)
        half = dict(list(stored().items())[::2])
        assert all(
            torch.equal(value, half.get(name, eager[name])) for name, value in tensors.items() if "head" not in name
        )
        assert len(report.missing) == len(stored()) - len(half)


@contextmanager
def warns_on_rank_0(name: str) -> Iterator[None]:
    if dist.get_rank() == 0:
        with pytest.warns(UserWarning, match="not in it"):
            yield
    else:
        yield


def strict_is_refused_on_every_rank_with_nothing_changed(path: Path) -> None:
    for _, strategy in strategies():
        runtime = Runtime(accelerator=accelerator(), strategy=strategy)
        with runtime.init_module(empty_init=True):
            torch.manual_seed(7)
            model = Model()
        wrapped = runtime.setup(model)
        before = {name: tensor.clone() for name, tensor in whole(wrapped).items()}
        with pytest.raises(CheckpointKeyError, match="missing in the checkpoint"):
            runtime.load_raw(path / "half.safetensors", wrapped)
        assert all(torch.equal(tensor, before[name]) for name, tensor in whole(wrapped).items())


def a_rank_that_cannot_read_fails_all_of_them_in_seconds(path: Path) -> None:
    for when in ("before", "after"):
        for _, strategy in strategies():
            runtime = Runtime(accelerator=accelerator(), strategy=strategy)
            plain = data_file.DataFile.read_into
            last = runtime.world_size - 1

            def broken(
                self: data_file.DataFile, address: int, size_bytes: int, offset: int, runtime: Runtime = runtime
            ) -> None:
                if runtime.global_rank == last and size_bytes > 64 and offset > 0:  # noqa: B023
                    raise CheckpointError(f"reading {self.path} failed: Input/output error.")
                plain(self, address, size_bytes, offset)  # noqa: B023

            data_file.DataFile.read_into = broken  # type: ignore[method-assign]
            start = time.monotonic()
            try:
                with pytest.raises(
                    CheckpointError if runtime.global_rank == last else RankFailedError, match="Input/output"
                ):
                    make(runtime, path / "model.safetensors", when)
            finally:
                data_file.DataFile.read_into = plain  # type: ignore[method-assign]
            assert time.monotonic() - start < 20
            runtime.barrier()


def a_file_that_only_some_ranks_have_is_an_error_on_all(path: Path) -> None:
    runtime = Runtime(accelerator=accelerator(), strategy="fsdp")
    with runtime.init_module(empty_init=True):
        model = Model()
    # Rank 0's path counts; on another node there may be nothing.
    plain = raw_loader.open_saved
    if runtime.global_rank == 1:
        raw_loader.open_saved = lambda _, *rest, **options: plain(path / "absent.safetensors", *rest, **options)
    try:
        with pytest.raises((CheckpointError, RankFailedError), match="there is no checkpoint at"):
            runtime.load_raw(path / "model.safetensors", model)
    finally:
        raw_loader.open_saved = plain
    runtime.load_raw(path / "model.safetensors", model)
    runtime.setup(model)


def ranks_that_bind_other_files_are_told_so(path: Path) -> None:
    from nucleate.checkpoint import open_checkpoint
    from nucleate.deferred import bind

    runtime = Runtime(accelerator=accelerator(), strategy="fsdp")
    with runtime.init_module(empty_init=True):
        model = Model()
    if runtime.global_rank == 1:
        tensors = open_checkpoint(path / "model.safetensors").tensors
        bind(model.scale, tensors["scale"])
    with pytest.raises(RankDisagreementError):
        runtime.setup(model)


def a_model_that_is_deferred_on_some_ranks_only_is_filled_on_all(path: Path) -> None:
    for call in ("load", "load_raw"):
        runtime = Runtime(accelerator=accelerator(), strategy="ddp")
        with runtime.init_module(empty_init=runtime.global_rank == 0):
            model = Model()
        if call == "load":
            runtime.save(path / "whole", runtime.setup(Model()).module)
            runtime.load(path / "whole", model)
        else:
            runtime.load_raw(path / "model.safetensors", model)
        runtime.barrier()


def modules_that_load_in_their_own_way_read_what_they_own(path: Path) -> None:
    for when in ("before", "after"):
        for name, strategy in strategies():
            runtime = Runtime(
                accelerator=accelerator(), strategy=strategy, precision="bf16-true" if name == "fsdp" else "32-true"
            )
            torch.manual_seed(7 + runtime.global_rank)
            with runtime.init_module(empty_init=True):
                model: Any = own_ways.Model()
            if when == "after":
                model = runtime.setup(model)
            with counted() as read:
                assert runtime.load_raw(path / "own_ways.safetensors", model).is_exact
                if when == "before":
                    assert sum(read) == 0
                    model = runtime.setup(model)
            tensors = whole(model)
            for key, value in own_ways.eager(own_ways.old()).items():
                assert torch.equal(tensors[key], value.to(tensors[key].dtype)), key
            # A shard of a transposed weight is some columns of the file's, which are read with what lies between.
            itemsize = model.embed.weight.element_size()
            assert sum(read) <= 1.5 * owned_bytes(model) * 4 / itemsize, f"{name}: {sum(read)} of {owned_bytes(model)}"


CHECKS: list[Callable[[Path], None]] = [
    each_rank_reads_what_it_owns_and_no_more,
    what_is_missing_is_eagers_with_rank_0s_seed,
    strict_is_refused_on_every_rank_with_nothing_changed,
    a_rank_that_cannot_read_fails_all_of_them_in_seconds,
    a_file_that_only_some_ranks_have_is_an_error_on_all,
    ranks_that_bind_other_files_are_told_so,
    a_model_that_is_deferred_on_some_ranks_only_is_filled_on_all,
    modules_that_load_in_their_own_way_read_what_they_own,
]


def main(path: Path) -> None:
    runtime = Runtime(accelerator=accelerator(), strategy="ddp")
    runtime.launch()
    try:
        if runtime.is_global_zero:
            save_file(stored(), path / "model.safetensors")
            save_file(dict(list(stored().items())[::2]), path / "half.safetensors")
            save_file(own_ways.old(), path / "own_ways.safetensors")
        runtime.barrier()
        for check in CHECKS:
            check(path)
            runtime.barrier()
            # In one piece: ranks share the pipe.
            os.write(1, f"{check.__name__}\n".encode())
    finally:
        process_group.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
