"""Accelerators, the kinds of device. A new one implements `Accelerator` and registers under `nucleate.accelerators`."""

from nucleate.accelerators.base import Accelerator
from nucleate.accelerators.cpu import CPUAccelerator
from nucleate.accelerators.cuda import CUDAAccelerator
from nucleate.accelerators.generic import TorchAccelerator

__all__ = ["Accelerator", "CPUAccelerator", "CUDAAccelerator", "TorchAccelerator"]
