"""CUDA devices: a `TorchAccelerator` that knows CUDA's generator and what to check where there is no device."""

from __future__ import annotations

from typing import Self, final

from nucleate.accelerators.generic import TorchAccelerator
from nucleate.devices.cuda import CUDAHooks


@final
class CUDAAccelerator(CUDAHooks, TorchAccelerator):
    """Run on CUDA devices, with NCCL between them.

    Args:
        index: Which device a single process takes; None gives each process of a node the one of its local rank.
    """

    def __init__(self, index: int | None = None) -> None:
        super().__init__("cuda", index)

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Build it with its defaults."""
        return cls()

    def _what_to_check(self) -> str:
        return "check the driver (`nvidia-smi`) and CUDA_VISIBLE_DEVICES"
