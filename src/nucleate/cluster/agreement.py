"""The agreement of ranks before materialization: on their recipes, and on the bits that they would make."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nucleate.cluster.communicator import Communicator
from nucleate.cluster.numerics import Numerics, disagreement
from nucleate.errors import RankDisagreementError, name_list


def verify_same_model(
    digest: str, communicator: Communicator, numerics: Numerics | None = None, settings: Mapping[str, Any] | None = None
) -> None:
    """Check before materialization that every rank deferred the same model and would make the same bits.

    Args:
        digest: The fingerprint of this rank's recipes.
        communicator: The communicator of this process.
        numerics: The facts that this rank's bits depend on.
        settings: Arguments that must be equal on all ranks, by name.

    Raises:
        RankDisagreementError: Ranks recorded different constructions, got different settings, or have CPUs, thread
            counts or torch builds that would make different bits of this model. Every rank raises it.
    """
    ranks = communicator.gather_objects((digest, numerics or Numerics(), dict(settings or {})))
    for name, value in ranks[0][2].items():
        for rank, (_, _, other) in enumerate(ranks):
            if other.get(name) != value:
                raise RankDisagreementError(
                    f"{name} is {value!r} on rank 0 but {other.get(name)!r} on rank {rank}. Make all ranks equal."
                )
    others = [rank for rank, (other, _, _) in enumerate(ranks) if other != ranks[0][0]]
    if others:
        raise RankDisagreementError(
            f"rank {name_list(map(str, others))} constructed another model than rank 0, or loaded other values into "
            "it: other operations, shapes, seeds or state dicts. Construct and load the same model on every rank: use "
            "nothing that depends on the rank, the host or a seed of the rank, and load on all ranks, not on rank 0 "
            "alone."
        )
    differs = disagreement([other for _, other, _ in ranks])
    if differs is not None:
        raise RankDisagreementError(differs)


def share_generators(
    communicator: Communicator, device_state: Callable[[], Tensor | None], set_device_state: Callable[[Tensor], None]
) -> None:
    """Give every rank the states of rank 0's generators: torch's, the device's, Python's and NumPy's.

    Args:
        communicator: The communicator of this process.
        device_state: Returns the state of the device's own generator, or None where the device has none of its own.
        set_device_state: Sets the state of the device's generator.
    """
    numpy = sys.modules.get("numpy")
    state = (
        torch.get_rng_state(),
        device_state(),
        random.getstate(),
        numpy.random.get_state() if numpy is not None else None,
    )
    torch_state, on_device, python_state, numpy_state = communicator.broadcast(state)
    torch.set_rng_state(torch_state.cpu())
    if on_device is not None:
        set_device_state(on_device.cpu())
    random.setstate(python_state)
    if numpy is not None and numpy_state is not None:
        numpy.random.set_state(numpy_state)
