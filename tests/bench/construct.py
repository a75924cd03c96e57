"""Constructs the model in one way, in this process alone or on the ranks of torchrun, and reports what it took.

    python -m tests.bench.construct nucleate --size 1m --init plain --seed 1

Clock and peak run over construction and set-up of the model. CPU time is of all threads of a process; `part_cpu_s` is
what of it nucleate takes for the values of its own part of the model. Imports, the process group and everything that
happens once per process (shown as `first_use_s`, measured on a model of a thousand parameters) come before.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.bench.measure import report
from tests.bench.memory import Peak, available_bytes, prefault
from tests.bench.model import INITS, SIZES, blocks_of, make_model, num_parameters, reset

#: Calls the first argument to construct the model; what it returns is kept alive.
Build = Callable[[Callable[[], nn.Module]], object]


@dataclass(frozen=True)
class Way:
    """One way to come to a model that can be trained.

    Attributes:
        label: What the table calls it.
        prepare: Imports and launches what it needs; that is not measured. Returns what is.
        ranks: On how many processes.
        ours: Its weights must be eager's.
        once: Do not repeat it: it is only there to show that it fails.
    """

    label: str
    prepare: Callable[[], Build]
    ranks: int = 1
    ours: bool = False
    once: bool = False


def eager() -> Build:
    return lambda make: make()


def nucleate(strategy: str, empty_init: bool) -> Callable[[], Build]:
    def prepare() -> Build:
        from nucleate import Runtime

        _time_parts()

        runtime = Runtime(accelerator="cpu", strategy=strategy)
        runtime.launch()

        def build(make: Callable[[], nn.Module]) -> object:
            with runtime.init_module(empty_init=empty_init):
                model = make()
            return runtime.setup(model)

        return build

    return prepare


def fabric(strategy: str, empty_init: bool) -> Callable[[], Build]:
    def prepare() -> Build:
        from lightning.fabric import Fabric
        from lightning.fabric.strategies import ModelParallelStrategy  # type: ignore[attr-defined]

        chosen: Any = strategy
        if strategy == "model_parallel":
            chosen = ModelParallelStrategy(
                lambda model, mesh: shard(model, mesh["data_parallel"]), data_parallel_size=2, tensor_parallel_size=1
            )
        devices = 1 if strategy == "auto" else 2
        instance = Fabric(accelerator="cpu", strategy=chosen, devices=devices)
        instance.launch()

        def build(make: Callable[[], nn.Module]) -> object:
            with instance.init_module(empty_init=empty_init):
                model = make()
            return instance.setup(model)

        return build

    return prepare


def meta() -> Build:
    def build(make: Callable[[], nn.Module]) -> object:
        with torch.device("meta"):
            model = make()
        model.to_empty(device="cpu")
        reset(model)
        return model

    return build


def accelerate_prepare() -> Build:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    return lambda make: accelerator.prepare(make())


def accelerate_empty() -> Build:
    from accelerate import Accelerator, init_empty_weights

    accelerator = Accelerator(cpu=True)

    def build(make: Callable[[], nn.Module]) -> object:
        with init_empty_weights():
            model = make()
        model.to_empty(device="cpu")
        reset(model)
        return accelerator.prepare(model)

    return build


def eager_on_ranks() -> Build:
    dist.init_process_group("gloo")
    return eager()


def raw_shard_after_eager() -> Build:
    mesh = mesh_of_ranks()
    return lambda make: shard(make(), mesh)


def raw_shard_on_meta() -> Build:
    mesh = mesh_of_ranks()

    def build(make: Callable[[], nn.Module]) -> object:
        with torch.device("meta"):
            model = make()
        shard(model, mesh)
        model.to_empty(device="cpu")
        reset(model)
        return model

    return build


def raw_ddp() -> Build:
    dist.init_process_group("gloo")
    return lambda make: nn.parallel.DistributedDataParallel(make())


WAYS = {
    "eager": Way("eager torch", eager),
    "nucleate": Way(
        "nucleate, `init_module(empty_init=True)` + `setup`", nucleate("single_device", empty_init=True), ours=True
    ),
    "nucleate-real": Way(
        "nucleate, `init_module(empty_init=False)` + `setup`", nucleate("single_device", empty_init=False), ours=True
    ),
    "fabric-real": Way("Fabric, `init_module(empty_init=False)` + `setup`", fabric("auto", empty_init=False)),
    "fabric-empty": Way(
        "Fabric, `init_module(empty_init=True)` + `setup`: weights not initialized", fabric("auto", empty_init=True)
    ),
    "meta": Way("meta, `to_empty`, `reset_parameters`", meta),
    "accelerate": Way("Accelerate, `prepare(model)`", accelerate_prepare),
    "accelerate-empty": Way("Accelerate, `init_empty_weights`, `to_empty`, `reset_parameters`", accelerate_empty),
    "eager-ranks": Way("eager torch on each rank", eager_on_ranks, ranks=2),
    "shard-eager": Way("eager, then `fully_shard`", raw_shard_after_eager, ranks=2),
    "shard-meta": Way("meta, `fully_shard`, `to_empty`, `reset_parameters`", raw_shard_on_meta, ranks=2),
    "nucleate-fsdp": Way("nucleate `fsdp`", nucleate("fsdp", empty_init=True), ranks=2, ours=True),
    "nucleate-fsdp-4": Way("nucleate `fsdp`", nucleate("fsdp", empty_init=True), ranks=4, ours=True),
    "eager-ranks-4": Way("eager torch on each rank", eager_on_ranks, ranks=4),
    "shard-meta-4": Way("meta, `fully_shard`, `to_empty`, `reset_parameters`", raw_shard_on_meta, ranks=4),
    "fabric-shard-real": Way(
        "Fabric `ModelParallelStrategy`, `empty_init=False`", fabric("model_parallel", empty_init=False), ranks=2
    ),
    "fabric-shard-empty": Way(
        "Fabric `ModelParallelStrategy`, `empty_init=True`", fabric("model_parallel", empty_init=True), ranks=2
    ),
    "fabric-fsdp": Way("Fabric `FSDPStrategy`", fabric("fsdp", empty_init=True), ranks=2, once=True),
    "ddp": Way("eager, then torch DDP", raw_ddp, ranks=2),
    "nucleate-ddp": Way("nucleate `ddp`", nucleate("ddp", empty_init=True), ranks=2, ours=True),
    "fabric-ddp": Way("Fabric `ddp`, `empty_init=False`", fabric("ddp", empty_init=False), ranks=2),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--init", choices=INITS, required=True)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args(argv)
    size = SIZES[args.size]
    made: list[nn.Module] = []

    def make() -> nn.Module:
        made.append(make_model(size, args.init))
        return made[-1]

    build = WAYS[args.way].prepare()
    # What is imported, looked up or checked only once is not paid per parameter; it has a column of its own.
    start = time.perf_counter()
    build(lambda: make_model(SIZES["micro"], args.init))
    first_use_s = time.perf_counter() - start

    torch.manual_seed(args.seed)
    gc.collect()
    ranks = WAYS[args.way].ranks
    # The model in fp32 and a quarter; DDP takes buckets as large as the model besides. Alike for all that are compared.
    models = 1.25 if ranks == 1 else 4.5 / ranks
    prefault(min(int(models * 4 * num_parameters(size)), int(0.8 * available_bytes() / ranks)))
    if dist.is_initialized():
        dist.barrier()
    peak = Peak()
    global _part_cpu_s
    _part_cpu_s = 0.0
    start, cpu_start = time.perf_counter(), time.process_time()
    kept = build(make)
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    added_bytes = peak.added_bytes()

    stream = torch.rand(8).tolist()
    mine = {
        "first_use_s": first_use_s,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "part_cpu_s": _part_cpu_s,
        "peak_bytes": added_bytes,
        "weights": digest(made[0]),
        "stream": str(stream),
    }
    del kept
    every = [mine]
    if dist.is_initialized():
        every = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(every, mine)
    if not dist.is_initialized() or dist.get_rank() == 0:
        report({key: over_ranks([one[key] for one in every]) for key in mine})
    if dist.is_initialized():
        dist.barrier()
        time.sleep(0.2)
    # Not by the interpreter: gloo's threads now and then abort its exit, and nothing is left to be done.
    os._exit(0)


_part_cpu_s = 0.0


def _time_parts() -> None:
    # Not an import statement: the package offers a function of the same name.
    module: Any = import_module("nucleate.materialize.execute")
    make_parts: Any = module.make_parts

    def timed(*args: Any) -> None:
        global _part_cpu_s
        start = time.process_time()
        make_parts(*args)
        _part_cpu_s += time.process_time() - start

    module.make_parts = timed


def digest(model: nn.Module) -> str:
    """Return a fingerprint of every bit of every parameter and buffer; shards are gathered one tensor at a time."""
    total = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        whole = _whole(tensor)
        total.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
        data: Any = whole.numpy()
        total.update(data)
    return total.hexdigest()


@torch.no_grad()
def _whole(tensor: Tensor) -> Tensor:
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered.detach().contiguous()


def over_ranks(values: list[Any]) -> Any:
    """Return the worst number; of texts the one that all ranks have."""
    if isinstance(values[0], str):
        return values[0] if len(set(values)) == 1 else "the ranks differ"
    return max(values)


def mesh_of_ranks() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    return init_device_mesh("cpu", (dist.get_world_size(),))


def shard(model: Any, mesh: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


if __name__ == "__main__":
    main()
