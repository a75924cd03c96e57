"""Kinds of device. A new one implements `Accelerator` and registers under `nucleate.accelerators`."""

from nucleate.accelerators.base import Accelerator
from nucleate.accelerators.cpu import CPUAccelerator
from nucleate.accelerators.cuda import CUDAAccelerator

__all__ = ["Accelerator", "CPUAccelerator", "CUDAAccelerator"]
