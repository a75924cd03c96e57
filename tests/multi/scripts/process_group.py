"""One small training-like run that ends as the first argument says; run by test_process_group.py."""

from __future__ import annotations

import sys
from datetime import timedelta

import torch

from nucleate.cluster import Communicator, Environment, process_group

if __name__ == "__main__":
    how = sys.argv[1]
    environment = Environment.detect()
    process_group.start(environment, "gloo", timedelta(seconds=60), torch.device("cpu"))
    communicator = Communicator(environment, torch.device("cpu"))
    assert communicator.all_reduce(1, "sum").item() == environment.world_size
    if how == "raise" and environment.global_rank == 1:
        raise ValueError("out of cheese")
    if how == "raise":
        communicator.barrier()
    if how == "restart" and environment.restart_count == 0 and environment.global_rank == 1:
        sys.exit(7)
    if how == "restart":
        communicator.barrier()
    sys.stdout.write(f"attempt {environment.restart_count} ended\n")
