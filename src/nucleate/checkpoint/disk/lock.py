"""Lock on a place: one process saves there at a time. The system releases the lock when its process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path

from nucleate.errors import CheckpointError


class SaveLock:
    """A lock on a name in a folder, held through a hidden file `.NAME.lock` beside it.

    The file of a killed process stays, but the lock is free. The next process takes the file over and deletes it.

    Args:
        path: The place to lock; its folder must exist.
        wait: Wait until the lock is free, instead of raising an error.

    Raises:
        CheckpointError: Another process saves there.
        OSError: The folder cannot be written to.
    """

    def __init__(self, path: Path, *, wait: bool = False) -> None:
        self._path = path.with_name(f".{path.name}.lock")
        while True:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._take(path, wait)
            except BaseException:
                os.close(self._descriptor)
                raise
            if self._is_current():
                break
            # The former holder has deleted the file meanwhile: the locked file has no name any more.
            os.close(self._descriptor)
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def release(self) -> None:
        """Release the lock, and delete its file."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        # Unlock explicitly: a process that was forked meanwhile has the file open as well.
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)

    def _take(self, path: Path, wait: bool) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                return  # Some network file systems have no locks.
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            holder = ""
            with contextlib.suppress(OSError, UnicodeDecodeError):
                holder = os.pread(self._descriptor, 200, 0).decode()
            raise CheckpointError(
                f"another save to {path} is under way, by {holder or 'another process'}. Two jobs must not save to one "
                "place: give each a path of its own."
            ) from None

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False
