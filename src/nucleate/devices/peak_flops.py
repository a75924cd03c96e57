"""The peak of arithmetic of NVIDIA's devices, from their data sheets: dense, and with accumulation in float32.

The numbers with sparsity in the data sheets are twice as large. No dense model reaches them, so they are not used here.
"""

from __future__ import annotations

import re

import torch

_TERA = 1e12
#: By the words that a device's name must have: TFLOP/s in float64, float32, float32 on tensor cores (TF32), and in
#: bfloat16 and float16. More words come first. Sources: NVIDIA's data sheets of each device.
_TABLE: tuple[tuple[str, float, float, float, float, float], ...] = (
    ("B200", 37.0, 75.0, 1125.0, 2250.0, 2250.0),
    ("H200 NVL", 30.0, 60.0, 417.5, 835.5, 835.5),
    ("H200", 34.0, 67.0, 494.7, 989.4, 989.4),
    ("H100 NVL", 30.0, 60.0, 417.5, 835.5, 835.5),
    ("H100 PCIe", 26.0, 51.0, 378.0, 756.0, 756.0),
    ("H100", 34.0, 67.0, 494.7, 989.4, 989.4),
    ("A100", 9.7, 19.5, 156.0, 312.0, 312.0),
    ("L40S", 1.4, 91.6, 183.0, 362.0, 362.0),
    ("L40", 1.4, 90.5, 90.5, 181.0, 181.0),
    ("L4", 0.5, 30.3, 60.0, 121.0, 121.0),
    ("A10", 0.5, 31.2, 62.5, 125.0, 125.0),
    ("V100 SXM2", 7.8, 15.7, 15.7, 15.7, 125.0),
    ("V100", 7.0, 14.0, 14.0, 14.0, 112.0),
    ("T4", 0.25, 8.1, 8.1, 8.1, 65.0),
)
_COLUMNS = {torch.float64: 1, torch.float32: 2, torch.bfloat16: 4, torch.float16: 5}
_TF32 = 3


def peak_flops(device_name: str, dtype: torch.dtype, tf32: bool) -> float | None:
    """Return the number of floating point operations that a device can do in a second, or None where it is not known.

    Args:
        device_name: The name that the driver gives to the device.
        dtype: The dtype of the computation.
        tf32: Whether products in float32 may be computed in TF32.

    Example:
        >>> peak_flops("NVIDIA A100-SXM4-80GB", torch.bfloat16, tf32=False)
        312000000000000.0
        >>> peak_flops("NVIDIA A1000", torch.bfloat16, tf32=False)
    """
    words = set(re.split(r"[\s-]+", device_name))
    column = _TF32 if dtype == torch.float32 and tf32 else _COLUMNS.get(dtype)
    if column is None:
        return None
    for name, *teraflops in _TABLE:
        if words.issuperset(name.split()):
            return teraflops[column - 1] * _TERA
    return None
