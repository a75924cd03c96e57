"""Simulated devices that several ranks share, for layouts of more ranks than there are devices."""

from __future__ import annotations

from typing import Self, final

import torch

from nucleate.accelerators import TorchAccelerator

_RANKS_PER_DEVICE = 2


@final
class SharedDevices(TorchAccelerator):
    """Gives two ranks of a node the same device: ranks 0 and 2 the first one, 1 and 3 the second."""

    def __init__(self) -> None:
        super().__init__("sim")

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Build it."""
        return cls()

    def count(self) -> int:
        """Return how many ranks can have a device."""
        return super().count() * _RANKS_PER_DEVICE

    def select(self, local_rank: int) -> torch.device:
        """Make the device of a rank current and return it."""
        return super().select(local_rank % 2 if local_rank < self.count() else local_rank)
