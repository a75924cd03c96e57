"""Ranks that agree on their last step after SIGTERM, whoever gets the signal and however far the ranks are apart."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch

from nucleate.cluster import Communicator, Environment, process_group
from nucleate.cluster.sigterm import Sigterm
from nucleate.errors import RankFailedError

ROUNDS = 8


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def agree(communicator: Communicator, number: int) -> None:
    """Make steps of random lengths until the signal ends them, with or without waiting for each other."""
    plan = random.Random(number)  # the same on all ranks
    asked = plan.sample(range(communicator.world_size), plan.randint(1, communicator.world_size))
    coupled, delay = plan.random() < 0.5, plan.random() * 0.1
    listener = Sigterm(communicator.rank, communicator.world_size, str(number), lambda: None)
    listener.start()
    communicator.barrier()
    own = random.Random(1000 * number + communicator.rank)
    if communicator.rank in asked:
        threading.Timer(delay + own.random() * 0.02, terminate).start()
    ended = False
    while not ended:
        if own.random() < 0.3:
            time.sleep(own.random() * 0.01)
        if coupled:
            communicator.barrier()
        ended = listener.step_ended()
    counts = communicator.gather_objects(listener.num_steps)
    assert len(set(counts)) == 1, counts
    time.sleep(0.03)  # the signals of all have come
    communicator.barrier()
    listener.stop()


def step_on(listener: Sigterm) -> None:
    while not listener.step_ended():
        time.sleep(0.01)


def miss(communicator: Communicator) -> None:
    """Let a rank end before another one gets the signal."""
    listener = Sigterm(communicator.rank, communicator.world_size, "missed", lambda: None)
    listener.start()
    communicator.barrier()
    if communicator.rank == 1:
        listener.stop()
    communicator.barrier()
    if communicator.rank == 0:
        terminate()
        with pytest.raises(RankFailedError, match="cannot end after the same step: rank 1 has ended already."):
            step_on(listener)
    communicator.barrier()
    listener.stop()


if __name__ == "__main__":
    environment = Environment.detect()
    process_group.start(environment, "gloo", timedelta(seconds=60), torch.device("cpu"))
    communicator = Communicator(environment, torch.device("cpu"))
    for number in range(ROUNDS):
        agree(communicator, number)
    miss(communicator)
    sys.stdout.write("agreed\n")
