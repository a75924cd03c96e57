"""A count of the ranks that report the same value, in the group's store. Nobody waits for it."""

from __future__ import annotations

from itertools import count
from typing import final

import torch.distributed as dist

from nucleate.cluster.environment import Environment

# Numbers the tallies of this process. All ranks make them in the same order, so the numbers agree.
_numbers = count()


@final
class Tally:
    """A count of the ranks that report the same value. All ranks make it in the same order.

    Args:
        environment: The place of this process among all processes.
    """

    def __init__(self, environment: Environment) -> None:
        self._world_size = environment.world_size
        self._prefix = f"nucleate/tally/{environment.restart_count}/{next(_numbers)}"

    def completes(self, value: str) -> bool:
        """Report a value, and return whether this rank is the last of all ranks that report it.

        Args:
            value: The value. Each rank reports it at most once.
        """
        store = dist.distributed_c10d._get_default_store()
        return bool(store.add(f"{self._prefix}/{value}", 1) == self._world_size)
