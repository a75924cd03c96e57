"""CUDA as a kind of device: its Philox generator, which fills move by known distances, its processors and bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from nucleate.devices import philox
from nucleate.devices.hooks import DeviceHooks
from nucleate.devices.peak_flops import peak_flops


class CUDAHooks(DeviceHooks):
    """The hooks of CUDA."""

    def default_generator(self, device: torch.device) -> torch.Generator:
        """Return the generator that factories and in-place fills on the device use by default."""
        torch.cuda.init()
        return torch.cuda.default_generators[device.index]

    def fill_distance(self, is_normal: bool, numel: int, dtype: torch.dtype, device: torch.device) -> int | None:
        """Return the number that a random fill adds to the offset of Philox, or None where it is not known."""
        return philox.distance(is_normal, numel, dtype, device)

    def moved(self, state: Tensor, distance: int) -> Tensor:
        """Return the state with `distance` added to its offset."""
        return philox.moved(state, distance)

    def supports_bfloat16(self, device: torch.device) -> bool:
        """Return whether the device computes in bfloat16, natively or by emulation."""
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported())

    def peak_flops(self, device: torch.device, dtype: torch.dtype) -> float | None:
        """Return the device's peak from its data sheet, dense, or None for a device that is not in the table."""
        tf32 = torch.get_float32_matmul_precision() != "highest"
        return peak_flops(torch.cuda.get_device_name(device), dtype, tf32)

    def describe(self, device: torch.device) -> str:
        """Return the device's name, its number of multiprocessors, and the CUDA version that torch was built with."""
        found = torch.cuda.get_device_properties(device)
        return f"{found.name} with {found.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}"
