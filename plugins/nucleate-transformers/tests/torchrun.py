"""Runs a script of `scripts/` on several ranks of this machine, and gives back what they printed.

`run_ranks` starts them with torchrun. `fork_ranks` forks them from a process that has imported torch already, by the
harness of the core's tests.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
HARNESS = TESTS.parents[2] / "tests" / "multi" / "ranks.py"


def run_ranks(script: str, nproc: int, *args: object, timeout: float = 240) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), variables.get("PYTHONPATH", "")]))
    variables["OMP_NUM_THREADS"] = "1"
    process = subprocess.Popen(
        [*command, str(TESTS / "scripts" / script), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=variables,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException:
        process.terminate()  # torchrun ends its ranks
        output, _ = process.communicate(timeout=45)
        raise AssertionError(f"{script} on {nproc} ranks did not end.\n{output[-8000:]}") from None
    if process.returncode:
        pytest.fail(f"{script} on {nproc} ranks exited with {process.returncode}.\n{output[-8000:]}")
    return output


def fork_ranks(script: str, nproc: int, *args: object, timeout: float = 240) -> str:
    spec = importlib.util.spec_from_file_location("nucleate_tests_ranks", HARNESS)
    assert spec is not None
    assert spec.loader is not None
    harness = sys.modules.get(spec.name)
    if harness is None:  # one for all tests: it keeps a process to fork from
        harness = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(harness)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")])))
        return str(harness.fork_ranks(TESTS / "scripts" / script, nproc, *args, timeout=timeout).stdout)
