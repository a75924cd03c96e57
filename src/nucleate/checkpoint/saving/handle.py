"""A save that continues while training continues."""

from __future__ import annotations

import atexit
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

_unfinished: SaveHandle | None = None


class SaveHandle:
    """A checkpoint that a thread writes in the background.

    The interpreter does not end before the checkpoint is written. If writing fails and nobody waits, the next save
    raises the error, or the interpreter prints it at its end.

    Attributes:
        path: The checkpoint's place.
    """

    def __init__(self, path: Path, work: Callable[[], None]) -> None:
        """Start the work. Only one save runs at a time."""
        global _unfinished
        assert _unfinished is None or _unfinished.done(), "the previous save must have ended"
        self.path = path
        self._work: Callable[[], None] | None = work
        self._error: BaseException | None = None
        self._told = False
        # Not a daemon: the interpreter's end cuts daemons off.
        self._thread = threading.Thread(target=self._run, name="nucleate-save", daemon=False)
        self._thread.start()
        _unfinished = self
        atexit.register(tell)

    def done(self) -> bool:
        """Return whether writing has ended, with success or not."""
        return not self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the checkpoint is whole.

        Args:
            timeout_s: The longest wait in seconds; None waits without a limit.

        Raises:
            CheckpointError: Writing failed.
            RankFailedError: Writing failed on another rank.
            TimeoutError: The checkpoint is not written yet.
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
            # The frames that the error passed through hold the tensors that were being written.
            traceback.clear_frames(error.__traceback__)
            self._error = error
        finally:
            # This frees the copy of the state.
            self._work = None

    def __repr__(self) -> str:
        state = "being written" if not self.done() else "failed" if self._error is not None else "written"
        return f"SaveHandle({str(self.path)!r}, {state})"


def settle() -> BaseException | None:
    """Wait for the running save, and return its error if nobody has seen the error yet."""
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
