"""Prints as JSON what a run of the tests depends on: the devices, torch, CUDA, NCCL and the machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib import metadata
from typing import Any

import torch

from tests.gpu.device import DEVICE_TYPE, count, device


def read() -> dict[str, Any]:
    """Return the facts."""
    is_cuda = DEVICE_TYPE == "cuda" and torch.cuda.is_available()
    num_devices = count()
    names = [torch.cuda.get_device_name(number) for number in range(num_devices)] if is_cuda else []
    return {
        "device": DEVICE_TYPE,
        "devices": num_devices,
        "gpu": names[0] if names else None,
        "gpus": names,
        "device_bytes": torch.accelerator.get_memory_info(device())[1] if num_devices else 0,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if is_cuda else None,
        "nucleate": metadata.version("nucleate"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "host_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "date": str(datetime.date.today()),
    }


if __name__ == "__main__":
    print(json.dumps(read()))
