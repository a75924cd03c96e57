"""A connection between two processes that carries small messages, and that the kernel closes when a process ends."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import threading
from collections.abc import Iterable
from typing import Any, Self

Message = dict[str, Any]

#: The kernel asks a silent peer after this time, so often, and then gives it up: a machine that is gone sends nothing.
_IDLE_S, _INTERVAL_S, _PROBES = 1, 1, 4
_SEND_S = 1.0
_SILENT = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
_CHUNK = 1 << 16


class Link:
    """One connection. Any thread may send; one thread receives.

    Attributes:
        is_silent: Whether the connection is gone because the other machine does not answer. Otherwise its kernel has
            closed the connection, because the process ended.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.is_silent = False
        self._received = b""
        self._lock = threading.Lock()
        connection.settimeout(_SEND_S)
        _notice_death(connection)

    @classmethod
    def to(cls, hosts: Iterable[str], port: int, patience_s: float) -> Self | None:
        """Connect to a port, or return None if no host answers there.

        Args:
            hosts: Names and addresses of the machine. Some of them may not lead there.
            port: The port.
            patience_s: The time for each host.
        """
        for host in hosts:
            with contextlib.suppress(OSError):
                return cls(socket.create_connection((host, port), timeout=patience_s))
        return None

    def send(self, message: Message) -> bool:
        """Send a message, and return False if the connection is gone."""
        data = json.dumps(message).encode() + b"\n"
        try:
            with self._lock:
                self.socket.sendall(data)
        except OSError:
            return False
        return True

    def receive(self) -> list[Message] | None:
        """Return the messages that have arrived; None means that the connection is gone."""
        try:
            data = self.socket.recv(_CHUNK)
        except OSError as error:
            self.is_silent = error.errno in _SILENT
            # Without a number it is Python's own timeout: nothing has arrived.
            return [] if error.errno in (None, errno.EINTR, errno.EAGAIN) else None
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError:  # A stranger, for example one that looks for open ports.
            return None

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError):
            self.socket.close()


def _notice_death(connection: socket.socket) -> None:
    """Let the kernel close the connection soon after the other machine is gone."""
    options = {
        "TCP_NODELAY": 1,
        "TCP_KEEPIDLE": _IDLE_S,
        "TCP_KEEPINTVL": _INTERVAL_S,
        "TCP_KEEPCNT": _PROBES,
        "TCP_USER_TIMEOUT": 1000 * (_IDLE_S + _INTERVAL_S * _PROBES),
    }
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
