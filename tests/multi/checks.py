"""Runs a list of checks on every rank, each in a folder of its own, and says which of them have held."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nucleate.cluster import Communicator


def run_checks(
    checks: Sequence[Callable[[Communicator, Path], None]], communicator: Communicator, folder: Path
) -> None:
    """Call each check and print its name; one that fails ends the rank."""
    for check in checks:
        place = folder / check.__name__
        if communicator.rank == 0:
            place.mkdir()
        communicator.barrier()
        check(communicator, place)
        sys.stdout.write(f"{check.__name__}\n")
        sys.stdout.flush()
