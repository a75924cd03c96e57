"""The simulated device "sim": two devices of CPU memory on which a missing event or synchronization shows every time.

Kernels are the CPU's and run when they are called. Copies that do not block wait in the queue of their stream. So the
order of copies among each other and against kernels is tested; the order of kernels of two streams is not, nor are
Philox's numbers, overlap in time, fragmentation, NCCL, sparse tensors, and kernels' own rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.sim import build
from tests.sim.build import NoCompiler
from tests.sim.module import make_module

__all__ = ["NoCompiler", "install"]


def install() -> Any:
    """Make torch know the device and return its controls, the compiled module. Later calls only return them.

    It must come before the first backward pass of a process: torch's autograd engine starts its threads then, one for
    each device that it knows.

    Raises:
        NoCompiler: It is not built yet and cannot be built here.
        RuntimeError: The process has run a backward pass before.
    """
    extension = build.load()
    if not hasattr(torch, "sim"):
        torch.utils.rename_privateuse1_backend("sim")
        torch._register_device_module("sim", make_module(extension))
        torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
        if dist.is_available():
            _register_collectives(extension)
        _start_autograd()
        extension.reset_counts()
    return extension


def _register_collectives(extension: Any) -> None:
    def create(store: dist.Store, rank: int, size: int, timeout: Any) -> Any:
        return extension.make_backend(dist.ProcessGroupGloo(store, rank, size, timeout=timeout))

    dist.Backend.register_backend("simccl", create, devices=["sim"])


def _start_autograd() -> None:
    try:
        torch.ones((), device="sim", requires_grad=True).backward()
    except RuntimeError as error:
        raise RuntimeError(
            "install() came after a backward pass of this process, whose autograd threads do not know the simulated "
            "device. Call install() first."
        ) from error
