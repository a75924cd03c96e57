"""The sockets of gloo's groups in this process, which wake the ranks that wait on them when they are closed.

`abort` of a gloo group does nothing as long as somebody refers to the group, and DDP and FSDP do (2.13). Each group has
one thread that waits for its sockets by epoll, and Linux tells which thread waits for which sockets.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from pathlib import Path

_THREAD = "gloo_tcp_loop"
# A loop wakes every 10 ms, and is outside of epoll for moments.
_TRIES, _PAUSE_S = 20, 0.005


def shut_down() -> int:
    """Shut the connections of all gloo groups of this process down, and return their number; Linux only.

    The threads of this process and of other ranks that wait for these connections get an error.
    """
    if sys.platform != "linux":
        return 0
    sockets = {fd for epoll in _epolls() for fd in _watched(epoll)}
    return sum(_shut(fd) for fd in sockets)


def _epolls() -> set[int]:
    """Return the descriptors of the epoll instances for which gloo's threads wait."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            if (task / "comm").read_text().strip() == _THREAD:
                found.add(_epoll_of(task))
    return found - {-1}


def _epoll_of(task: Path) -> int:
    """Return the first argument of the system call that a thread is in, which is epoll_wait."""
    for _ in range(_TRIES):
        number, *arguments = (task / "syscall").read_text().split()
        if number not in ("running", "-1") and arguments:
            fd = int(arguments[0], 16)
            with contextlib.suppress(OSError):
                if "eventpoll" in os.readlink(f"/proc/self/fd/{fd}"):
                    return fd
        time.sleep(_PAUSE_S)
    return -1


def _watched(epoll: int) -> list[int]:
    """Return the descriptors that an epoll instance watches; see `man 5 proc_pid_fdinfo`."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/self/fdinfo/{epoll}").read_text().splitlines()
        return [int(line.split()[1]) for line in lines if line.startswith("tfd:")]
    return []


def _shut(fd: int) -> bool:
    """Shut a connection down, and leave its descriptor open: gloo closes it."""
    with contextlib.suppress(OSError):
        with socket.socket(fileno=os.dup(fd)) as connection:
            connection.getpeername()  # not a socket that listens
            connection.shutdown(socket.SHUT_RDWR)
        return True
    return False
