"""Runs a script of `scripts/`, whose ranks torchrun or Lightning starts, and gives back what they printed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(script: str, *args: object, torchrun: bool, timeout: float = 200) -> str:
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), variables.get("PYTHONPATH", "")]))
    variables["OMP_NUM_THREADS"] = "1"
    process = subprocess.Popen(
        [sys.executable, *(TORCHRUN if torchrun else ()), str(TESTS / "scripts" / script), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=variables,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException:
        # The ranks that Lightning starts stay in the session of the first one.
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=45)
        raise AssertionError(f"{script} {args} did not end.\n{output[-8000:]}") from None
    if process.returncode:
        pytest.fail(f"{script} {args} exited with {process.returncode}.\n{output[-8000:]}")
    return output
