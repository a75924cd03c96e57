"""Runs a Python script on several ranks of one machine, started by torchrun, and gives back what they printed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_ranks(
    script: str | Path,
    nproc: int,
    *args: object,
    timeout: float = 120,
    expected_rc: int | None = 0,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `script` under torchrun on `nproc` ranks, one thread each.

    Args:
        script: A path ending in `.py`, or the dotted name of a module.
        nproc: How many ranks.
        args: Passed to the script as strings.
        timeout: Seconds after which all of it is killed and the test fails.
        expected_rc: What torchrun must exit with; None accepts anything but 0.
        env: Added to the environment of the ranks.

    Raises:
        AssertionError: It exited otherwise, or took too long; the message carries the output.
    """
    target = [str(script)] if str(script).endswith(".py") else ["-m", str(script)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    # The ranks import the tests' modules; the launching process may be a rank itself, so its place is hidden.
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH", "")]))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in (env or {}):
            variables.pop(name, None)

    process = subprocess.Popen(
        [*command, *target, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
        cwd=ROOT,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        stdout, stderr = _end(process)
        raise AssertionError(
            f"{script} on {nproc} ranks did not end within {timeout} s.\n{_tail(stdout, stderr)}"
        ) from None
    except BaseException:
        _end(process)
        raise

    rc = process.returncode
    if (rc == 0) if expected_rc is None else (rc != expected_rc):
        wanted = "a failure" if expected_rc is None else expected_rc
        raise AssertionError(f"{script} on {nproc} ranks exited with {rc}, expected {wanted}.\n{_tail(stdout, stderr)}")
    return subprocess.CompletedProcess(process.args, rc, stdout, stderr)


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End torchrun so that it ends its ranks: they are in sessions of their own and would outlive a SIGKILL."""
    process.send_signal(signal.SIGTERM)
    try:
        # torchrun gives the ranks 30 s before it kills them.
        return process.communicate(timeout=45)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()


def _tail(stdout: str, stderr: str, limit: int = 8000) -> str:
    return f"--- stdout\n{stdout[-limit:]}\n--- stderr\n{stderr[-limit:]}"
