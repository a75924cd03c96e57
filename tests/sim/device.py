"""The simulated device "sim": two devices of CPU memory on which a missing event or synchronization shows every time.

Kernels are the CPU's and run when they are called. Copies that do not block wait in the queue of their stream. So the
order of copies among each other and against kernels is tested; the order of kernels of two streams is not, nor are
Philox's numbers, overlap in time, fragmentation, NCCL, sparse tensors, and kernels' own rounding.
"""

from __future__ import annotations

import atexit
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Variable

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
        _wait_for_autograd()
    except RuntimeError as error:
        raise RuntimeError(
            "install() came after a backward pass of this process, whose autograd threads do not know the simulated "
            "device. Call install() first."
        ) from error
    # A thread of the engine takes Python's lock after a backward pass that `Tensor.backward` began, to let go of the
    # context that torch gave it. Where Python ends meanwhile, the process aborts, on every device of torch.
    atexit.register(_wait_for_autograd)


def _wait_for_autograd() -> None:
    """Run a small backward pass on each device by the engine itself, whose thread then waits without Python's lock."""
    for index in range(2):
        root = torch.ones((), device=f"sim:{index}", requires_grad=True).clone()
        Variable._execution_engine.run_backward((root,), (torch.ones_like(root),), False, False, (), True, True)
