"""Files of their full size, made before anything is written: a full disk is noticed before hours are spent."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path

from nucleate.errors import CheckpointError

# What a file system that cannot reserve space answers.
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM)


def create_file(path: Path, size_bytes: int, head: bytes = b"") -> None:
    """Make a file of its full size, with its first bytes.

    Raises:
        CheckpointError: There is no room, or it cannot be written there.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            reserve(descriptor, size_bytes)
            written = 0
            while written < len(head):
                written += os.pwrite(descriptor, head[written:], written)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise failure(path, error, size_bytes) from error


def reserve(descriptor: int, size_bytes: int) -> None:
    """Give a file its size, with space on disk where the file system can reserve it.

    Raises:
        OSError: There is no room.
    """
    if not size_bytes:
        return
    fallocate = _fallocate()
    # Not `os.posix_fallocate`: where the file system cannot, it writes to every block.
    if fallocate is not None and fallocate(descriptor, 0, 0, size_bytes) != 0:
        number = ctypes.get_errno()
        if number not in _CANNOT_RESERVE:
            raise OSError(number, os.strerror(number))
    os.ftruncate(descriptor, size_bytes)


def failure(path: Path, error: OSError, size_bytes: int | None = None) -> CheckpointError:
    """Return the error to raise where writing a file failed.

    Args:
        path: The file, or the folder that it was to be in.
        error: What the system said.
        size_bytes: How large it was to be.
    """
    message = f"{path} cannot be written: {error.strerror or error}."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = free_bytes(path.parent)
        message += "" if size_bytes is None else f" {size_bytes} bytes are needed."
        message += "" if free is None else f" {free} bytes are free."
        message += " Make room, or save elsewhere."
    elif error.errno == errno.ENOENT:
        message += " If several nodes save together, they must share the file system."
    return CheckpointError(message)


def free_bytes(folder: Path) -> int | None:
    """Return how much room there is on the disk of a folder, as far as the system tells."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize


def check_room(folder: Path, size_bytes: int) -> None:
    """Make sure that there is room in a folder.

    Raises:
        CheckpointError: There is not.
    """
    free = free_bytes(folder)
    if free is not None and free < size_bytes:
        raise failure(folder, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), size_bytes)


@functools.cache
def _fallocate() -> Callable[[int, int, int, int], int] | None:
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if function is None:  # not on macOS
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int
    result: Callable[[int, int, int, int], int] = function
    return result
