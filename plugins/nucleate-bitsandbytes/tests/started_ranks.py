"""Ranks that torchrun starts: one of the scripts here, in several processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def output_of_ranks(script: str, num_ranks: int, *arguments: str) -> str:
    """Run a script on several ranks, and return all that they print.

    Args:
        script: The name of a file in `scripts`.
        num_ranks: The number of ranks.
        arguments: The arguments of the script.
    """
    path = Path(__file__).parent / "scripts" / script
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(path), *arguments], capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout
