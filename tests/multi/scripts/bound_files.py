"""What loading inside `init_module` promises across ranks, checked on every rank of a real group."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from lightning_fabric.utilities.load import _lazy_load
from safetensors.torch import load_file, load_model, save_file
from torch import nn

from nucleate import Runtime
from nucleate.cluster import process_group
from nucleate.deferred import record_of
from nucleate.errors import CheckpointError, RankFailedError
from tests.integrations.test_diffusers import UNET, VAE
from tests.integrations.weights import write_in_place
from tests.multi.device import accelerator
from tests.multi.scripts.load_raw import Model, stored, strategies, whole
from tests.multi.scripts.load_state_dict import MIB, Wide, complete, peak_bytes

PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16}
LOADS: dict[str, Callable[[nn.Module, Path], object]] = {
    "safetensors": lambda model, path: model.load_state_dict(load_file(path / "whole.safetensors")),
    "load_model": lambda model, path: load_model(model, path / "tied.safetensors"),
    "torch": lambda model, path: model.load_state_dict(torch.load(path / "whole.pt")),
    "lazy": lambda model, path: model.load_state_dict(_lazy_load(path / "whole.pt")),
}


def each_strategy_and_precision() -> list[tuple[Runtime, torch.dtype]]:
    return [
        (Runtime(accelerator=accelerator(), strategy=strategy, precision=precision), dtype)
        for name, strategy in strategies()
        if name in ("ddp", "fsdp")
        for precision, dtype in PRECISIONS.items()
    ]


def the_values_are_those_of_the_files(path: Path) -> None:
    for load in LOADS.values():
        for runtime, dtype in each_strategy_and_precision():
            torch.manual_seed(runtime.global_rank)
            with runtime.init_module(empty_init=True):
                model = Model()
                load(model, path)
            assert all(record_of(tensor) is not None for tensor in model.parameters())
            wrapped = runtime.setup(model)
            assert wrapped.head.weight is wrapped.embed.weight
            tensors = whole(wrapped)
            assert tensors["embed.weight"].dtype == dtype
            for name, value in complete().items():
                assert torch.equal(tensors[name], value.to(tensors[name].dtype)), name


def from_pretrained_of_diffusers_is_diffusers_own(path: Path) -> None:
    for cls, folder in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        loader: Any = cls
        for options in ({"low_cpu_mem_usage": True}, {"low_cpu_mem_usage": False}):
            expected = loader.from_pretrained(path / folder, **options)
            for runtime, dtype in each_strategy_and_precision():
                with runtime.init_module(empty_init=True):
                    model = loader.from_pretrained(path / folder, **options)
                assert all(record_of(tensor) is not None for tensor in model.parameters())
                tensors = whole(runtime.setup(model))
                assert list(tensors) == list(expected.state_dict())
                for name, value in expected.state_dict().items():
                    assert torch.equal(tensors[name], value.to(dtype)), name


def a_file_that_is_written_is_an_error_on_all_ranks(path: Path) -> None:
    for strategy in ("ddp", "fsdp"):
        runtime = Runtime(accelerator=accelerator(), strategy=strategy)
        mine = path / f"{strategy}{runtime.global_rank}" / "whole.safetensors"
        mine.parent.mkdir()
        save_file({name: value.clone() for name, value in complete().items()}, mine)
        with runtime.init_module(empty_init=True):
            model = Model()
            model.load_state_dict(load_file(mine))
        last = runtime.global_rank == runtime.world_size - 1
        if last:
            write_in_place(mine)
        with pytest.raises(CheckpointError if last else RankFailedError, match="was written to"):
            runtime.setup(model)


def nothing_but_the_kept_weights_is_allocated(path: Path) -> None:
    loads: dict[str, Callable[[nn.Module], object]] = {
        "safetensors": lambda model: model.load_state_dict(load_file(path / "wide.safetensors")),
        "torch": lambda model: model.load_state_dict(torch.load(path / "wide.pt")),
        "lazy": lambda model: model.load_state_dict(_lazy_load(path / "wide.pt")),
    }
    for strategy in ("ddp", "fsdp"):
        for precision, size in (("32-true", 4), ("bf16-true", 2)):
            for name, load in loads.items():
                runtime = Runtime(accelerator=accelerator(), strategy=strategy, precision=precision)
                gc.collect()
                with peak_bytes() as peak:
                    with runtime.init_module(empty_init=True):
                        model = Wide()
                        load(model)
                    kept = size * sum(parameter.numel() for parameter in model.parameters())
                    kept //= runtime.world_size if strategy == "fsdp" else 1
                    wrapped = runtime.setup(model)
                figures = f"{peak[0] / MIB:.0f} of {kept / MIB:.0f} MiB"
                assert peak[0] < kept + 16 * MIB, f"{strategy} {precision} {name}: {figures}"
                del wrapped, model
                gc.collect()
                runtime.barrier()


CHECKS: list[Callable[[Path], None]] = [
    the_values_are_those_of_the_files,
    from_pretrained_of_diffusers_is_diffusers_own,
    a_file_that_is_written_is_an_error_on_all_ranks,
    nothing_but_the_kept_weights_is_allocated,
]


def main(path: Path) -> None:
    diffusers.logging.set_verbosity(diffusers.logging.CRITICAL)
    runtime = Runtime(accelerator=accelerator(), strategy="ddp")
    runtime.launch()
    try:
        if runtime.is_global_zero:
            save_file({name: value.clone() for name, value in complete().items()}, path / "whole.safetensors")
            save_file(stored(), path / "tied.safetensors")
            torch.save(complete(), path / "whole.pt")
            save_file(Wide().state_dict(), path / "wide.safetensors")
            torch.save(Wide().state_dict(), path / "wide.pt")
            UNet2DConditionModel(**UNET).save_pretrained(path / "unet", max_shard_size="100KB")
            AutoencoderKL(**VAE).save_pretrained(path / "vae", safe_serialization=False)
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
