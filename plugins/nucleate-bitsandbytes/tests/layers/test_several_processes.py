"""Quantized layers on several gloo ranks, each group started by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"


def run_ranks(script: str, nproc: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(SCRIPTS / script), *arguments], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("all hold") == nproc


@pytest.mark.parametrize("nproc", [2, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize("part", ["bfloat16", "float32", "rest"])
def test_fsdp_computes_trains_saves_and_loads_as_one_process_does(nproc: int, part: str) -> None:
    run_ranks("sharded.py", nproc, part)


def test_ddp_trains_what_is_beside_quantized_layers() -> None:
    run_ranks("replicated.py", 2)
