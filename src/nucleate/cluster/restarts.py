"""Restarts: all ranks start again after a failure, and the script loads its last checkpoint.

This file counts the restarts of ranks that nucleate starts, and checks the argument `max_restarts`. `supervisor.py`
runs each attempt. A launcher such as torchrun counts restarts of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from nucleate.cluster.rank_end import Failure
from nucleate.errors import ConfigurationError

T = TypeVar("T")

#: The time in seconds that ranks get to end after a signal, before they are killed.
END_S = 2
#: The same for ranks that save before they end. torchrun gives as much.
SAVE_S = 30


class RanksFailed(Exception):  # noqa: N818 - it carries a failure
    """A rank failed, and all ranks have ended.

    Attributes:
        failure: The failure of the first rank that failed.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms on which ranks end.

    Attributes:
        max_restarts: The number of times that all ranks start again after a failure.
        end_s: The time in seconds that ranks get to end after a signal, before they are killed.
    """

    max_restarts: int = 0
    end_s: int = END_S

    def run(self, attempt: Callable[[int], T]) -> T:
        """Run attempts until one succeeds, and return its result.

        Args:
            attempt: Runs all ranks, given the number of restarts so far.

        Raises:
            RanksFailed: The last attempt failed.
        """
        for count in range(self.max_restarts):
            try:
                return attempt(count)
            except RanksFailed as error:
                number = f"restart {count + 1} of {self.max_restarts}"
                sys.stderr.write(f"{error.failure.in_short} All ranks start again: {number}.\n")
                sys.stderr.flush()
        return attempt(self.max_restarts)


def check_max_restarts(value: object) -> None:
    """Refuse an argument `max_restarts` that is not a number of restarts.

    Args:
        value: The argument of the `Runtime`.

    Raises:
        ConfigurationError: The value is not an integer of at least 0.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigurationError(f"max_restarts={value!r} must be an integer of at least 0.")
