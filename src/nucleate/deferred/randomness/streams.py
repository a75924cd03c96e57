"""Distances in random streams: the draws that a random step takes, and the state of a generator behind them.

A distance is counted in 32-bit draws for the CPU's Mersenne Twister. Every other device counts in its own way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nucleate.deferred.randomness.fills import fill_of, fills_as_described
from nucleate.deferred.randomness.mersenne_twister import Stream, Workspace
from nucleate.deferred.tape.steps import Step
from nucleate.deferred.torch_modes import plain_modes
from nucleate.devices import hooks_of, is_present


def distance(step: Step, device: torch.device) -> int | None:
    """Return the distance by which a step moves the generator, or None if it is not known beforehand.

    Args:
        step: A random step.
        device: The generator's device.
    """
    fill = fill_of(step)
    if fill is None:
        return None
    if device.type == "cpu":
        return fill.num_draws if fills_as_described(fill.is_normal, fill.dtype) else None
    if not is_present(device):
        return None
    with plain_modes():
        return hooks_of(device).fill_distance(fill.is_normal, fill.numel, fill.dtype, device)


def moved(device_type: str, state: Tensor, distance: int, workspace: Workspace) -> Tensor:
    """Return a generator's state moved forward.

    Args:
        device_type: The generator's device type.
        state: Its state.
        distance: The distance.
        workspace: Memory for jumps.
    """
    if device_type != "cpu":
        return hooks_of(torch.device(device_type)).moved(state, distance)
    stream = Stream(state, 0)
    stream.seek(distance, workspace)
    return stream.generator.get_state()
