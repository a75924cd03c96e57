"""On several ranks: rank 0 writes, and every rank knows the folder and refuses what is not a metric."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from nucleate import Runtime
from nucleate.errors import RankFailedError, UsageError
from nucleate.loggers import CSVLogger
from tests.multi.device import accelerator

folder = Path(sys.argv[1])


class Recorder:
    """Logs on the rank that calls it."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.seen.append(step)


recorder = Recorder()
runtime = Runtime(accelerator=accelerator(), strategy="ddp", loggers=[CSVLogger(folder, "exp"), recorder])
is_first = runtime.global_rank == 0
if not is_first:
    with pytest.raises(UsageError, match="launch"):
        runtime.logger.log_dir  # noqa: B018
runtime.launch()
assert len(set(runtime._communicator.gather_objects(runtime.logger.log_dir))) == 1
runtime.log("rank", runtime.global_rank)
runtime.log_dict({"mean": runtime.all_reduce(torch.tensor(float(runtime.global_rank)))}, step=3)
runtime.logger.log_hyperparams({"rank": runtime.global_rank})
with pytest.raises(UsageError, match="'grad'"):
    runtime.log("grad", torch.ones(2))
assert recorder.seen == ([0, 3] if is_first else [])
runtime.barrier()
mean = (runtime.world_size - 1) / 2
assert (folder / "exp/version_0/metrics.csv").read_text() == f"step,rank,mean\n0,0,\n3,,{mean}\n"
assert [path.name for path in (folder / "exp").iterdir()] == ["version_0"]

# A place that rank 0 cannot make is an error on every rank.
(folder / "file").write_text("")
blocked = Runtime(accelerator=accelerator(), strategy="ddp", loggers=CSVLogger(folder / "file"))
with pytest.raises((OSError, RankFailedError), match="file"):
    blocked.launch()
runtime.barrier()
print("rank 0 alone writes", flush=True)
