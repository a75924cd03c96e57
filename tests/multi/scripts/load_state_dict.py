"""What `load_state_dict` before `setup` promises across ranks, checked on every rank of a real group."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.cluster import process_group
from nucleate.errors import DeferredEditError, RankDisagreementError, RankFailedError
from tests.multi.device import ON_CPU, accelerator
from tests.multi.scripts.load_raw import Model, stored, strategies, whole

MIB = 2**20


def lazy(runtime: Runtime, seed: int = 7) -> Model:
    torch.manual_seed(seed + runtime.global_rank)
    with runtime.init_module(empty_init=True):
        return Model()


def complete() -> dict[str, Tensor]:
    state = stored()
    return {**state, "head.weight": state["embed.weight"]}


READS: dict[str, Callable[[Path], Mapping[str, Tensor]]] = {
    "memory": lambda path: complete(),
    "safetensors": lambda path: load_file(path / "whole.safetensors"),
    "torch": lambda path: torch.load(path / "whole.pt", mmap=True),
    "torch, not mapped": lambda path: torch.load(path / "whole.pt"),
}


def the_values_are_those_of_the_state_dict(path: Path) -> None:
    for _, strategy in strategies():
        for precision, dtype in (("32-true", torch.float32), ("bf16-true", torch.bfloat16)):
            for read in READS.values():
                for inside in (False, True):
                    runtime = Runtime(accelerator=accelerator(), strategy=strategy, precision=precision)
                    model, state = lazy(runtime), read(path)
                    with runtime.init_module(empty_init=True) if inside else nullcontext():
                        result = model.load_state_dict(state)
                    assert (result.missing_keys, result.unexpected_keys) == ([], [])
                    wrapped = runtime.setup(model)
                    tensors = whole(wrapped)
                    assert tensors["embed.weight"].dtype == dtype
                    assert wrapped.head.weight is wrapped.embed.weight
                    for name, value in complete().items():
                        assert torch.equal(tensors[name], value.to(tensors[name].dtype)), name


def assigned_tensors_are_kept(path: Path) -> None:
    for _, strategy in strategies():
        runtime = Runtime(accelerator=accelerator(), strategy=strategy)
        model = lazy(runtime)
        state = complete()
        model.load_state_dict(state, assign=True)
        model = runtime.setup(model)
        assert model.head.weight is model.embed.weight
        tensors = whole(model)
        assert all(torch.equal(tensors[name], value) for name, value in state.items())


def what_is_missing_is_eagers_with_rank_0s_seed(path: Path) -> None:
    torch.manual_seed(7)
    eager = Model().state_dict()
    half = dict(list(stored().items())[::2])
    for _, strategy in strategies():
        runtime = Runtime(accelerator=accelerator(), strategy=strategy)
        model = lazy(runtime)
        model.load_state_dict(half, strict=False)
        tensors = whole(runtime.setup(model))
        assert all(
            torch.equal(value, half.get(name, eager[name])) for name, value in tensors.items() if "head" not in name
        )


def other_values(path: Path, rank: int) -> dict[str, Mapping[str, Tensor]]:
    """Return state dicts that differ from rank to rank, each in its own way; nothing is loaded from an empty one."""
    state = complete()
    stale = path / f"node{rank}"
    stale.mkdir(exist_ok=True)
    shifted = {name: tensor + rank for name, tensor in state.items()}
    save_file(shifted | {"head.weight": shifted["head.weight"].clone()}, stale / "whole.safetensors")
    return {
        "one tensor": {**state, "single": state["single"] + rank},
        "the order of rows": {**state, "blocks.0.0.weight": state["blocks.0.0.weight"].roll(rank, 0)},
        "only rank 0 loads": state if rank == 0 else {},
        "a file of the same name": load_file(stale / "whole.safetensors"),
    }


def ranks_with_other_values_are_told_so(path: Path) -> None:
    for _, strategy in strategies():
        runtime = Runtime(accelerator=accelerator(), strategy=strategy)
        for state in other_values(path, runtime.global_rank).values():
            model = lazy(runtime)
            model.load_state_dict(state, strict=False)
            with pytest.raises(RankDisagreementError):
                runtime.setup(model)


def a_tensor_that_one_rank_has_changed_is_an_error_on_all(path: Path) -> None:
    for _, strategy in strategies():
        runtime = Runtime(accelerator=accelerator(), strategy=strategy)
        model = lazy(runtime)
        state = complete()
        model.load_state_dict(state)
        last = runtime.global_rank == runtime.world_size - 1
        if last:
            state["single"].zero_()
        start = time.monotonic()
        with pytest.raises(DeferredEditError if last else RankFailedError, match="changed in place.*single"):
            runtime.setup(model)
        assert time.monotonic() - start < 20


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 2048, bias=False) for _ in range(12))


def nothing_but_the_kept_weights_is_allocated(path: Path) -> None:
    for name, strategy in strategies():
        if name not in ("ddp", "fsdp"):
            continue
        for precision, size in (("32-true", 4), ("bf16-true", 2)):
            for mapped in (True, False):
                runtime = Runtime(accelerator=accelerator(), strategy=strategy, precision=precision)
                with runtime.init_module(empty_init=True):
                    model = Wide()
                kept = size * sum(parameter.numel() for parameter in model.parameters())
                kept //= runtime.world_size if name == "fsdp" else 1
                state = (
                    load_file(path / "wide.safetensors")
                    if mapped
                    else {key: torch.ones_like(value, device="cpu") for key, value in Wide().state_dict().items()}
                )
                gc.collect()
                with peak_bytes() as peak:
                    model.load_state_dict(state)
                    wrapped = runtime.setup(model)
                figures = f"{peak[0] / MIB:.0f} of {kept / MIB:.0f} MiB"
                assert peak[0] < kept + 16 * MIB, f"{name} {precision} mapped={mapped}: {figures}"
                del wrapped, model, state
                gc.collect()
                runtime.barrier()


def anonymous_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@contextmanager
def peak_bytes() -> Iterator[list[int]]:
    base, done = anonymous_bytes(), threading.Event()
    peak = [0]

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], anonymous_bytes() - base)
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


CHECKS: list[Callable[[Path], None]] = [
    the_values_are_those_of_the_state_dict,
    assigned_tensors_are_kept,
    what_is_missing_is_eagers_with_rank_0s_seed,
    ranks_with_other_values_are_told_so,
    a_tensor_that_one_rank_has_changed_is_an_error_on_all,
    # A device keeps its weights beside those of the host, and a simulated one in the same memory.
    *([nothing_but_the_kept_weights_is_allocated] if ON_CPU else []),
]


def main(path: Path) -> None:
    runtime = Runtime(accelerator=accelerator(), strategy="ddp")
    runtime.launch()
    try:
        if runtime.is_global_zero:
            save_file({name: value.clone() for name, value in complete().items()}, path / "whole.safetensors")
            torch.save(complete(), path / "whole.pt")
            save_file(Wide().state_dict(), path / "wide.safetensors")
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
