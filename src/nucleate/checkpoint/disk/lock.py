"""Lock on a place: one process saves there at a time. The system releases the lock when its process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from nucleate.errors import CheckpointError

# Follows the note of the last holder while another process tidies up after it.
_TIDYING = b"\ntidying"
# A process that tidies up holds the lock for milliseconds.
_ATTEMPTS = 10
_PAUSE_S = 0.05
# A save on another machine counts as dead if none of its files has changed for this long.
_SILENCE_S = 24 * 3600


class SaveLock:
    """A lock on a name in a folder, held through a hidden file `.NAME.lock` beside it.

    The file of a killed process stays, but the lock is free. The next process takes the file over and deletes it.

    Args:
        path: The place to lock; its folder must exist.
        wait: Wait until the lock is free, instead of raising an error.
        tidies: Take the lock only to tidy up after a save that is surely dead.

    Raises:
        CheckpointError: Another process saves there. With `tidies`, also if the last save is not surely dead.
        OSError: The folder cannot be written to.
    """

    def __init__(self, path: Path, *, wait: bool = False, tidies: bool = False) -> None:
        self._path = path.with_name(f".{path.name}.lock")
        self._is_real = True
        while True:
            self._descriptor = self._opened()
            try:
                self._take(path, wait)
                is_current = self._is_current()
                if is_current and tidies:
                    self._begin_to_tidy(path)
            except BaseException:
                os.close(self._descriptor)
                raise
            if is_current:
                break
            # The former holder has deleted the file meanwhile: the locked file has no name any more.
            os.close(self._descriptor)
        if tidies:
            return
        with contextlib.suppress(OSError):
            # The file is never empty: a file without a note could belong to another program.
            os.ftruncate(self._descriptor, os.pwrite(self._descriptor, _own_note(), 0))

    def release(self) -> None:
        """Release the lock, and delete its file."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        # Unlock explicitly: a process that was forked meanwhile has the file open as well.
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)

    def _opened(self) -> int:
        """Open the file, or create it locked and with this process's note, and return the descriptor."""
        try:
            descriptor = os.open(self._path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
        except (OSError, AttributeError):  # not on every system, and not on every file system
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.write(descriptor, _own_note())
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # With a descriptor, Python follows the link to the file without a name (`os.link` in posixmodule.c, 3.11).
            os.link(f"/proc/self/fd/{descriptor}", self._path, src_dir_fd=descriptor)
        except OSError:  # The file exists.
            os.close(descriptor)
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _take(self, path: Path, wait: bool) -> None:
        for _ in range(_ATTEMPTS):
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                return
            except OSError as error:
                if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    self._is_real = False
                    return  # Some network file systems have no locks.
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
            if not self._note().endswith(_TIDYING):
                break
            time.sleep(_PAUSE_S)
        holder = self._note().partition(b"\n")[0].decode(errors="ignore")
        raise CheckpointError(
            f"another save to {path} is under way, by {holder or 'another process'}. Two jobs must not save to one "
            "place: give each a path of its own."
        )

    def _note(self) -> bytes:
        """Return the note that the last holder wrote: a line with its number and machine, and the machine's boot id."""
        with contextlib.suppress(OSError):
            return os.pread(self._descriptor, 200, 0)
        return b"unreadable"

    def _begin_to_tidy(self, path: Path) -> None:
        """Let other saves to this name wait for a moment, or raise an error if the last holder may live.

        Raises:
            CheckpointError: The last holder is not surely dead.
        """
        note = self._note().removesuffix(_TIDYING)
        if not self._is_dead(path, note):
            raise CheckpointError(f"the last save to {path} may still run.")
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, _TIDYING, len(note))

    def _is_dead(self, path: Path, note: bytes) -> bool:
        """Return whether the last holder, who wrote a note, is surely dead. This process has the lock.

        Some network file systems give a lock to processes on several machines at once. So the lock alone counts only if
        the last holder ran on this machine since its start.
        """
        if not self._is_real:
            if note in (b"", _own_note()):  # This process has just created the file.
                os.unlink(self._path)
            return False
        if not note or note.partition(b"\n")[2].decode(errors="ignore") == _boot_id() != "":
            return True
        written = [os.fstat(self._descriptor).st_mtime, *_times_of_drafts(path)]
        return time.time() - max(written) > _SILENCE_S

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False


def is_note(path: Path) -> bool:
    """Return whether a file holds the note of a holder of a `SaveLock`."""
    try:
        with open(path, "rb") as file:
            return re.match(rb"process \d+ on ", file.read(200)) is not None
    except OSError:
        return False


def _own_note() -> bytes:
    return f"process {os.getpid()} on {socket.gethostname()}\n{_boot_id()}".encode()


def _boot_id() -> str:
    """Return the id of this start of the machine. No other machine or start has the same id. Empty without Linux."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _times_of_drafts(path: Path) -> Iterator[float]:
    """Yield the times of the last changes to the drafts of a name, and to their files."""
    for draft in path.parent.iterdir():
        if draft.name.startswith(f".{path.name}.draft-"):
            with contextlib.suppress(OSError):
                yield draft.stat().st_mtime
                for file in draft.iterdir() if draft.is_dir() else ():
                    yield file.stat().st_mtime
