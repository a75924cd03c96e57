"""Creation of files in their full size, before any tensor is written: a full disk raises an error early."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path

from nucleate.errors import CheckpointError

# The errors of a file system that cannot reserve space.
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM)

_SHARE = "If several nodes save together, they must share the file system."


def create_file(path: Path, size_bytes: int, head: bytes = b"") -> None:
    """Create a file in its full size, and write its first bytes.

    Raises:
        CheckpointError: The disk has too little space, or the file cannot be written there.
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
    """Give a file its size, and reserve the space on disk if the file system can.

    Raises:
        OSError: The disk has too little space.
    """
    if not size_bytes:
        return
    fallocate = _fallocate()
    # `os.posix_fallocate` writes to every block if the file system cannot reserve space.
    if fallocate is not None and fallocate(descriptor, 0, 0, size_bytes) != 0:
        number = ctypes.get_errno()
        if number not in _CANNOT_RESERVE:
            raise OSError(number, os.strerror(number))
    os.ftruncate(descriptor, size_bytes)


def check_seen(folder: Path) -> None:
    """Check that this rank sees the folder that rank 0 has made for the ranks of all nodes.

    Raises:
        CheckpointError: The folder is not there.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"rank 0 has made the folder {folder}, but this rank does not see it. {_SHARE} Save to a path that leads "
            "to the same folder on each node."
        )


def failure(path: Path, error: OSError, size_bytes: int | None = None) -> CheckpointError:
    """Return the error to raise after a file could not be written.

    Args:
        path: The file, or its folder.
        error: The system's error.
        size_bytes: The size that the file needs.
    """
    message = f"{path} cannot be written: {error.strerror or error}."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = free_bytes(path.parent)
        message += "" if size_bytes is None else f" {size_bytes} bytes are needed."
        message += "" if free is None else f" {free} bytes are free."
        message += " Make room, or save elsewhere."
    elif error.errno == errno.ENOENT:
        message += f" {_SHARE}"
    return CheckpointError(message)


def free_bytes(folder: Path) -> int | None:
    """Return the free bytes on a folder's disk, or None if the system does not tell them."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize


def check_room(folder: Path, size_bytes: int) -> None:
    """Check that a folder's disk has enough free space.

    Raises:
        CheckpointError: The disk has too little space.
    """
    free = free_bytes(folder)
    if free is not None and free < size_bytes:
        raise failure(folder, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), size_bytes)


@functools.cache
def _fallocate() -> Callable[[int, int, int, int], int] | None:
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if function is None:  # macOS has neither.
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int
    result: Callable[[int, int, int, int], int] = function
    return result
