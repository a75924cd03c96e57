"""CUDA devices: a `TorchAccelerator` with CUDA's random generator, and with advice if there is no device."""

from __future__ import annotations

from typing import Self, final

from nucleate.accelerators.generic import TorchAccelerator
from nucleate.devices.cuda import CUDAHooks


@final
class CUDAAccelerator(CUDAHooks, TorchAccelerator):
    """The accelerator for CUDA devices, which communicate over NCCL.

    Args:
        index: The device of a single process; None gives each process of a node the device of its local rank.
    """

    def __init__(self, index: int | None = None) -> None:
        super().__init__("cuda", index)

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Build the accelerator with its defaults."""
        return cls()

    def _what_to_check(self) -> str:
        return "check the driver (`nvidia-smi`) and CUDA_VISIBLE_DEVICES"
