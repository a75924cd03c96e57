"""A save that goes on while training does."""

from __future__ import annotations

import atexit
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

_unfinished: SaveHandle | None = None


class SaveHandle:
    """Stands for a checkpoint that is being written in the background.

    The interpreter does not end before it is written. If writing fails and nobody waits, the next save raises the
    error, or it is printed when the interpreter ends.

    Attributes:
        path: Where the checkpoint will be.
    """

    def __init__(self, path: Path, work: Callable[[], None]) -> None:
        """Start the work; there is one at a time."""
        global _unfinished
        assert _unfinished is None or _unfinished.done(), "the last one was waited for"
        self.path = path
        self._work: Callable[[], None] | None = work
        self._error: BaseException | None = None
        self._told = False
        # No daemon: those are cut off when the interpreter ends.
        self._thread = threading.Thread(target=self._run, name="nucleate-save", daemon=False)
        self._thread.start()
        _unfinished = self
        atexit.register(tell)

    def done(self) -> bool:
        """Return whether writing has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the checkpoint is whole.

        Args:
            timeout_s: How long at most; None for as long as it takes.

        Raises:
            CheckpointError: Writing failed.
            RankFailedError: Writing failed on another rank.
            TimeoutError: It is not done yet.
        """
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the checkpoint {self.path} is not written yet after {timeout_s} s.")
        self._told = True
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        assert self._work is not None
        try:
            self._work()
        except BaseException as error:
            # The frames that it passed through hold what was being written.
            traceback.clear_frames(error.__traceback__)
            self._error = error
        finally:
            # With it goes the copy of the state.
            self._work = None

    def __repr__(self) -> str:
        state = "being written" if not self.done() else "failed" if self._error is not None else "written"
        return f"SaveHandle({str(self.path)!r}, {state})"


def settle() -> BaseException | None:
    """Wait for the save that is under way, and return its error if nobody has heard of it."""
    global _unfinished
    handle, _unfinished = _unfinished, None
    if handle is None:
        return None
    handle._thread.join()
    error = None if handle._told else handle._error
    handle._told = True
    return error


def tell() -> None:
    """Raise the error of a save that nobody waited for, when the interpreter ends."""
    atexit.unregister(tell)
    error = settle()
    if error is not None:
        raise error
