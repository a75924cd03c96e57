"""The launcher's process on this node. A rank that a launcher started ends when that process ends."""

from __future__ import annotations

import os
from pathlib import Path

from nucleate.cluster import parent
from nucleate.cluster.environment import RUN_ID

# A launcher that runs inside of a rank of another one has that rank's variables. Its own ranks have other values.
_PLACE = (RUN_ID, "RANK", "MASTER_PORT")

_is_bound = False


def bind(run_id: str) -> None:
    """End this process when its launcher ends, however it ends. A process that was started by hand is not bound.

    Args:
        run_id: The launcher's name for the run, or `""` for a process that was started by hand.
    """
    global _is_bound
    if run_id and not _is_bound:
        parent.bind(process())
        _is_bound = True


def process() -> int:
    """Return the process id of the launcher: of the nearest ancestor that is not in this rank's place itself.

    The parent may be a script of the user that the launcher has started, and that has started this process.
    """
    found = os.getppid()
    place = {os.fsencode(f"{name}={os.environ.get(name)}") for name in _PLACE}
    while place <= _variables(found):
        before = _parent_of(found)
        if before is None:
            break
        found = before
    return found


def _variables(process: int) -> set[bytes]:
    """Return the environment variables with which a process began, or no variables if the system hides them."""
    try:
        return set(Path(f"/proc/{process}/environ").read_bytes().split(b"\0"))
    except OSError:
        return set()


def _parent_of(process: int) -> int | None:
    try:
        # The name of the program, in parentheses, may have spaces.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1]) or None
    except OSError:
        return None
