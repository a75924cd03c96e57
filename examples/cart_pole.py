"""Poles on carts, many at once: the control problem of Barto, Sutton and Anderson (1983) in tensors.

A cart runs on a track. A pole stands on it and falls, unless the cart is pushed to the left or to the right in time.
Each step that the pole stands is a reward of 1. An episode ends when the pole leans too far, when the cart leaves the
track, or after 500 steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_STEPS = 500
GRAVITY, CART_KG, POLE_KG, HALF_POLE_M = 9.8, 1.0, 0.1, 0.5
FORCE_N, STEP_S = 10.0, 0.02
TRACK_M, LEAN = 2.4, math.radians(12)


class CartPoles:
    """A number of carts; each starts anew when its episode has ended.

    Args:
        count: How many carts.
        random: The generator of the states that episodes start from.
    """

    def __init__(self, count: int, random: torch.Generator) -> None:
        self._random = random
        self._num_steps = torch.zeros(count, dtype=torch.long)
        #: `(count, 4)`: place and speed of the cart, angle and speed of the pole.
        self.states = self._starts(count)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Push each cart, to the left for 0 and to the right for 1; return the rewards, and which episodes ended."""
        _, speed, angle, turn = self.states.unbind(dim=1)
        force = FORCE_N * (2.0 * actions - 1)
        total = CART_KG + POLE_KG
        push = (force + POLE_KG * HALF_POLE_M * turn**2 * angle.sin()) / total
        lever = HALF_POLE_M * (4 / 3 - POLE_KG * angle.cos() ** 2 / total)
        turning = (GRAVITY * angle.sin() - angle.cos() * push) / lever
        speeding = push - POLE_KG * HALF_POLE_M * turning * angle.cos() / total
        changes = torch.stack((speed, speeding, turn, turning), dim=1)
        states = self.states + STEP_S * changes

        self._num_steps += 1
        ended = (states[:, 0].abs() > TRACK_M) | (states[:, 2].abs() > LEAN) | (self._num_steps >= MAX_STEPS)
        self._num_steps[ended] = 0
        self.states = torch.where(ended[:, None], self._starts(len(states)), states)
        return torch.ones(len(states)), ended

    def _starts(self, count: int) -> Tensor:
        return torch.rand(count, 4, generator=self._random) * 0.1 - 0.05
