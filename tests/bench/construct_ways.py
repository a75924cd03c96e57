"""The ways to construct a model: nucleate's, torch's own, Fabric's and Accelerate's."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.bench.model import blocks_of, reset

#: Calls the first argument to construct the model; what it returns is kept alive.
Build = Callable[[Callable[[], nn.Module]], object]


@dataclass(frozen=True)
class Way:
    """One way to come to a model that can be trained.

    Attributes:
        label: What the table calls it.
        prepare: Imports and launches what it needs for a model of that dtype; that is not measured. Returns what is.
        ranks: On how many processes.
        ours: Its weights must be eager's.
        once: Do not repeat it: it is only there to show that it fails.
    """

    label: str
    prepare: Callable[[torch.dtype], Build]
    ranks: int = 1
    ours: bool = False
    once: bool = False


def eager(_: torch.dtype) -> Build:
    return lambda make: make()


def nucleate(strategy: str, empty_init: bool | None, times_parts: bool = True) -> Callable[[torch.dtype], Build]:
    def prepare(dtype: torch.dtype) -> Build:
        from nucleate import Runtime

        if times_parts:
            _time_parts()

        precision = "32-true" if dtype == torch.float32 else "bf16-true"
        runtime = Runtime(accelerator="cpu", strategy=strategy, precision=precision)
        runtime.launch()

        def build(make: Callable[[], nn.Module]) -> object:
            with runtime.init_module(empty_init=empty_init):
                model = make()
            return runtime.setup(model)

        return build

    return prepare


def fabric(strategy: str, empty_init: bool) -> Callable[[torch.dtype], Build]:
    def prepare(dtype: torch.dtype) -> Build:
        from lightning.fabric import Fabric
        from lightning.fabric.strategies import ModelParallelStrategy  # type: ignore[attr-defined]

        chosen: Any = strategy
        if strategy == "model_parallel":
            chosen = ModelParallelStrategy(
                lambda model, mesh: shard(model, mesh["data_parallel"]), data_parallel_size=2, tensor_parallel_size=1
            )
        devices = 1 if strategy == "auto" else 2
        precision: Any = "32-true" if dtype == torch.float32 else "bf16-true"
        instance = Fabric(accelerator="cpu", strategy=chosen, devices=devices, precision=precision)
        instance.launch()

        def build(make: Callable[[], nn.Module]) -> object:
            with instance.init_module(empty_init=empty_init):
                model = make()
            return instance.setup(model)

        return build

    return prepare


def meta(_: torch.dtype) -> Build:
    def build(make: Callable[[], nn.Module]) -> object:
        with torch.device("meta"):
            model = make()
        model.to_empty(device="cpu")
        reset(model)
        return model

    return build


def accelerate_prepare(_: torch.dtype) -> Build:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    return lambda make: accelerator.prepare(make())


def accelerate_empty(_: torch.dtype) -> Build:
    from accelerate import Accelerator, init_empty_weights

    accelerator = Accelerator(cpu=True)

    def build(make: Callable[[], nn.Module]) -> object:
        with init_empty_weights():
            model = make()
        model.to_empty(device="cpu")
        reset(model)
        return accelerator.prepare(model)

    return build


def eager_on_ranks(dtype: torch.dtype) -> Build:
    dist.init_process_group("gloo")
    return eager(dtype)


def raw_shard_after_eager(_: torch.dtype) -> Build:
    mesh = mesh_of_ranks()
    return lambda make: shard(make(), mesh)


def raw_shard_on_meta(_: torch.dtype) -> Build:
    mesh = mesh_of_ranks()

    def build(make: Callable[[], nn.Module]) -> object:
        with torch.device("meta"):
            model = make()
        shard(model, mesh)
        model.to_empty(device="cpu")
        reset(model)
        return model

    return build


def raw_ddp(_: torch.dtype) -> Build:
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


def part_cpu_s() -> float:
    """Return the CPU time that nucleate has taken for values in this process; 0 where it did not."""
    return _part_cpu_s


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


def mesh_of_ranks() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    return init_device_mesh("cpu", (dist.get_world_size(),))


def shard(model: Any, mesh: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)
