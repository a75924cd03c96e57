"""The machine in words: everything the numbers depend on, and nothing that tells it from others of its kind."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tests.bench.measure import MeasurementError, in_process
from tests.bench.state import STATES

_ROOT = Path("/")
_BALLOON = "0x0005"
#: The bit of a balloon that reports free pages to its host (`VIRTIO_BALLOON_F_REPORTING`).
_REPORTING = 5
#: Firmware that names no vendor has tables which name their maker.
_MAKERS = {"FIRECK": "Firecracker", "CLOUDH": "Cloud Hypervisor", "BOCHS": "QEMU", "VRTUAL": "Hyper-V"}


def describe(pages: bool = False) -> str:
    """Return some sentences: kind, cores, memory and versions.

    Args:
        pages: Also say when huge pages are used and how long a first touch takes, which is measured for 35 s.
    """
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    text = (
        f"{kind()}, {cores} {platform.machine()} cores ({torch.backends.cpu.get_cpu_capability()}), "
        f"{memory_bytes / 2**30:.0f} GiB of memory, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, Lightning Fabric {_version('lightning')}"
    )
    return f"{text}. {page_costs()}" if pages else text


def kind(root: Path = _ROOT) -> str:
    """Return whether this is bare metal or a virtual machine, and of which maker.

    Args:
        root: The folder that holds `proc` and `sys`.
    """
    if not re.search(r"^(flags|Features)\b.*\bhypervisor\b", _read(root / "proc/cpuinfo"), re.MULTILINE):
        named = _detected() if root == _ROOT else ""
        return f"Virtual machine ({named})" if named else "Bare metal"
    names = [_read(root / "sys/class/dmi/id" / name).strip() for name in ("sys_vendor", "product_name")]
    named = " ".join(filter(None, names)) or _table_maker(root) or (_detected() if root == _ROOT else "")
    words = [named or "maker unknown"]
    if _reports_free_pages(root):
        words.append("free memory goes back to its host")
    return f"Virtual machine ({', '.join(words)})"


def huge_pages(root: Path = _ROOT) -> str:
    """Return the setting of transparent huge pages: `always`, `madvise` or `never`."""
    setting = re.search(r"\[(\w+)\]", _read(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    return setting[1] if setting else "not offered"


@functools.cache
def page_costs() -> str:
    """Measure what 2 MiB cost as a huge page and as small ones, in each state, and return a sentence."""
    try:
        costs = in_process("-m", "tests.bench.page_costs", threads=1)
    except MeasurementError as error:
        return f"Transparent huge pages: {huge_pages()}; their costs could not be measured: {error}"
    each = "; ".join(
        f"{state}, {costs[f'{state} huge']:.2f} ms as a huge page and {costs[f'{state} small']:.2f} ms as small ones"
        for state in STATES
    )
    return f"Transparent huge pages: {huge_pages()}. First touch of 2 MiB: {each}"


def _detected() -> str:
    """Ask the programs that know, where they are installed."""
    for command, pattern in (("systemd-detect-virt", r"^(?!none)(\S+)"), ("lscpu", r"Hypervisor vendor:\s*(.+)")):
        if shutil.which(command):
            output = subprocess.run([command], capture_output=True, text=True, check=False).stdout
            if found := re.search(pattern, output):
                return found[1].strip()
    return ""


def _table_maker(root: Path) -> str:
    try:
        # The maker's 6 letters stand at byte 10 of each table.
        maker = (root / "sys/firmware/acpi/tables/DSDT").read_bytes()[10:16].decode("ascii", "replace").strip()
    except OSError:
        return ""
    return _MAKERS.get(maker, maker)


def _reports_free_pages(root: Path) -> bool:
    for device in (root / "sys/bus/virtio/devices").glob("*"):
        if _read(device / "device").strip() == _BALLOON:
            return _read(device / "features")[_REPORTING : _REPORTING + 1] == "1"
    return False


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
