"""Ranks that wait until their launcher ends: one inside of a collective, one outside; run by test_launcher.py."""

from __future__ import annotations

import os
import sys
import time

import torch.distributed as dist

from nucleate import Runtime


def main(group: str) -> None:
    if group == "users":
        dist.init_process_group("gloo")
    runtime = Runtime(accelerator="cpu", strategy=None if group == "none" else "ddp")
    runtime.launch()
    assert dist.is_initialized() == (group != "none")
    runtime.barrier()
    sys.stdout.write(f"PID {os.getpid()}\n")
    sys.stdout.flush()
    if runtime.global_rank == 0:
        time.sleep(600)
    runtime.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
