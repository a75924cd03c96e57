"""The table of `run_all.py --table`: a LLaMA of 7B loaded in six ways, by examples/03_quantized_inference.py."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.gpu.parts import variables
from tests.gpu.reporting import ROOT

SCRIPT = ROOT / "examples" / "03_quantized_inference.py"
#: The model and the device for each type of device. The example knows no simulated one; there it runs on the CPU.
SIZES = {"cuda": ("7B", "cuda"), "sim": ("tiny", "cpu")}
GIB = 2**30
#: What a way takes at 7B, in GiB of the device and of the host. Plain PyTorch first makes everything in fp32.
NEEDS = {"a": (15, 42), "b": (29, 16), "c": (15, 16), "d": (15, 16), "e": (9, 16), "f": (6, 16)}


def measure(device_type: str, facts: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """Run the example and return its table as text and as rows, and what went wrong.

    Args:
        device_type: `cuda`, or `sim` for a tiny model on the CPU.
        facts: What `tests.gpu.device_facts` prints.
        limit_s: Seconds after which the example is ended.
    """
    size, device = SIZES[device_type]
    ways, left_out = possible(facts) if size == "7B" else (list(NEEDS), [])
    with TemporaryDirectory(prefix="nucleate-table-") as name:
        folder = Path(name)
        command = [sys.executable, str(SCRIPT), "--size", size, "--device", device, "--tokens", "32"]
        command += ["--ways", *ways, "--folder", str(folder)]
        command += ["--train-steps", "30"] if size == "tiny" else []
        code, said = _run(command, device_type, limit_s)
        text = (folder / "table.md").read_text() if (folder / "table.md").exists() else ""
        rows: list[dict[str, str]] = []
        if (folder / "table.csv").exists():
            with (folder / "table.csv").open(newline="") as file:
                rows = list(csv.DictReader(file))
    fault = "" if code == 0 and rows else f"the example ended with {code}:\n{said[-4000:]}"
    notes = "\n".join([*left_out, *([fault] if fault else [])])
    return {
        "size": size,
        "device": device,
        "rows": rows,
        "left_out": left_out,
        "fault": fault,
        "text": f"{text}\n{notes}",
    }


def possible(facts: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the ways that the machine has the memory for, and why the others are left out."""
    ways, left_out = [], []
    for way, (device_gib, host_gib) in NEEDS.items():
        for what, needed, there in (
            ("device", device_gib, facts["device_bytes"] / GIB),
            ("host", host_gib, facts["host_bytes"] / GIB),
        ):
            if there < needed:
                left_out.append(
                    f"Way {way} was left out: it needs {needed} GiB of {what} memory, there are {there:.0f}."
                )
                break
        else:
            ways.append(way)
    return ways, left_out


def _run(command: list[str], device_type: str, limit_s: float) -> tuple[int | str, str]:
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables(device_type),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            # An interrupt lets the example end the process that it watches, and remove its files.
            process.send_signal(signal.SIGINT)
            try:
                said, _ = process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                said, _ = process.communicate()
            return f"its time limit of {limit_s:.0f} s", said
    return process.returncode, said
