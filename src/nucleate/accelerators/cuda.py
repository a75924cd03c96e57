"""CUDA devices: one for each process of a node, by local rank, with NCCL between them.

The group has gloo beside NCCL, so that objects and tensors in host memory (offloaded parameters, metadata)
are exchanged without a detour over the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from nucleate.accelerators.base import Accelerator
from nucleate.accelerators.placement import place
from nucleate.errors import ConfigurationError


@final
class CUDAAccelerator(Accelerator):
    """Run on CUDA devices."""

    name = "cuda"
    backend: ClassVar[str] = "cpu:gloo,cuda:nccl"
    pins_memory: ClassVar[bool] = True

    def __init__(self) -> None:
        self._device: torch.device | None = None

    @classmethod
    def is_available(cls) -> bool:
        """Return whether this torch was built with CUDA and sees a device."""
        return torch.cuda.is_available()

    def count(self) -> int:
        """Return how many CUDA devices this process sees."""
        return torch.cuda.device_count()

    def select(self, local_rank: int) -> torch.device:
        """Make the device with the number `local_rank` current and return it.

        Raises:
            ConfigurationError: There is no CUDA device, or none with that number.
        """
        if not self.is_available():
            why = (
                "this torch was built without CUDA: install one that has it"
                if not torch.backends.cuda.is_built()
                else "torch sees no device: check the driver (`nvidia-smi`) and CUDA_VISIBLE_DEVICES"
            )
            raise ConfigurationError(f"accelerator 'cuda' was asked for, but {why}, or use accelerator='cpu'.")
        if local_rank >= self.count():
            raise ConfigurationError(
                f"the process with local rank {local_rank} has no CUDA device: this node has {self.count()}. Start at "
                f"most {self.count()} processes on each node."
            )
        self._device = torch.device("cuda", local_rank)
        torch.cuda.set_device(self._device)
        return self._device

    def module_init_context(self) -> AbstractContextManager[object]:
        """Return the context in which factories place new tensors on the selected device."""
        return self._selected

    def setup(self, model: nn.Module) -> nn.Module:
        """Move what is real in `model` to the selected device, in place."""
        return place(model, self._selected)

    def peak_memory_bytes(self) -> int:
        """Return the most memory that tensors of this process have held on its device."""
        return torch.cuda.max_memory_allocated(self._selected)

    def random_state(self) -> Tensor:
        """Return the state of the device's generator."""
        return torch.cuda.get_rng_state(self._selected)

    def set_random_state(self, state: Tensor) -> None:
        """Restore what `random_state` returned."""
        torch.cuda.set_rng_state(state, self._selected)

    @property
    def _selected(self) -> torch.device:
        return self._device if self._device is not None else self.select(0)
