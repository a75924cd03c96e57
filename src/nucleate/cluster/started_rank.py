"""A rank that nucleate started: it tells its supervisor about its end. `supervisor.py` starts the ranks."""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from pathlib import Path
from types import TracebackType

from nucleate.cluster import parent
from nucleate.cluster.rank_end import RankEnd, consequence

#: The environment variable with the folder in which the ranks of a run tell about their ends.
FOLDER = "NUCLEATE_RANK_FOLDER"
#: The environment variable with the process id of the rank's parent.
SUPERVISOR = "NUCLEATE_SUPERVISOR"
#: The environment variable with the number of times that the supervisor has started all ranks again.
RESTARTS = "NUCLEATE_RESTART_COUNT"
# The time in which a killed rank is noticed. Ranks that fail as a consequence wait for it before they end.
_NOTICED_S = 0.2

_has_joined = False


def join() -> None:
    """Tell the supervisor about exceptions that end this script. Processes that nucleate did not start do nothing."""
    global _has_joined
    if _has_joined or _folder() is None:
        return
    _has_joined = True
    shown = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
        report(error, lambda: shown(kind, error, frames))

    sys.excepthook = tell
    if sys.platform != "linux":
        # Linux has bound this process to its supervisor before the script began.
        parent.bind(int(os.environ[SUPERVISOR]))


def be_child() -> None:
    """Make this process a rank of the run, whichever process its parent is."""
    os.environ[SUPERVISOR] = str(os.getppid())


def report(error: BaseException, show: object = None) -> int:
    """Tell the supervisor about the exception that ends this rank. The first rank that fails prints its traceback.

    Args:
        error: The exception.
        show: A function without arguments that prints the traceback; None prints it as Python does.

    Returns:
        The exit code of the rank.
    """
    code = _code(error)
    if code == 0:
        return 0
    is_exit = isinstance(error, SystemExit)
    text = "" if is_exit else "".join(traceback.format_exception(error))
    rank, folder = _rank(), _folder()
    end = None if folder is None else RankEnd.write(folder, rank, code, text)
    if is_exit:
        if isinstance(error.code, str):  # type: ignore[attr-defined]
            _print(error.code)  # type: ignore[attr-defined]
    elif end is None or end.is_first or folder is None:
        if callable(show):
            show()
        else:
            _print(text)
    elif not isinstance(error, KeyboardInterrupt):
        _print(consequence(rank, error, RankEnd.read(folder).values()))
    if end is not None and not isinstance(error, KeyboardInterrupt):
        time.sleep(_NOTICED_S)
    return code


def is_failing() -> bool:
    """Return whether a rank of this run has failed, so that the supervisor ends the others."""
    folder = _folder()
    return folder is not None and RankEnd.has_failure(folder)


def note_end() -> None:
    """Tell the supervisor that this rank leaves the process group, before the other ranks notice it."""
    folder = _folder()
    if folder is not None:
        RankEnd.write(folder, _rank())
        # The interpreter ends by several collections over all objects of torch, a quarter of the time of its import.
        gc.freeze()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _folder() -> Path | None:
    """Return the folder of this rank's run, or None in any other process, such as one that a rank has started."""
    folder, supervisor = os.environ.get(FOLDER), os.environ.get(SUPERVISOR)
    is_rank = folder and supervisor == str(os.getppid()) and os.path.isdir(folder)
    return Path(folder) if folder and is_rank else None


def _code(error: BaseException) -> int:
    """Return the exit code that Python gives to a process that an exception ends."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if not isinstance(error, SystemExit):
        return 1
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


def _print(text: object) -> None:
    sys.stderr.write(f"{str(text).rstrip()}\n")
    sys.stderr.flush()
