"""The machine in words: what the numbers depend on, and nothing that names it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch


def describe() -> str:
    """Return one line: cores, memory and versions."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} {platform.machine()} cores ({torch.backends.cpu.get_cpu_capability()}), "
        f"{memory_bytes / 2**30:.0f} GiB of memory, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, Lightning Fabric {_version('lightning')}"
    )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
