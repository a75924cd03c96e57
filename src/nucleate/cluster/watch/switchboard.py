"""Rank 0's side of the connections: it takes the messages of all ranks, its own too, to the hub."""

from __future__ import annotations

import secrets
import selectors
import socket
from collections.abc import Iterable

from nucleate.cluster.watch.hub import Hub
from nucleate.cluster.watch.link import Link, Message


class Switchboard:
    """The connections of all ranks with rank 0. The thread of the watch calls all methods but `close`.

    Args:
        world_size: The number of ranks.
        selector: Tells the thread which connections have something to read. What it calls stands in `data`.
        host: The address at which the ranks connect; `""` is every address of this machine.
    """

    def __init__(self, world_size: int, selector: selectors.BaseSelector, host: str) -> None:
        self._selector = selector
        self._links: dict[int, Link] = {}
        self._listener = socket.create_server((host, 0), backlog=world_size)
        self._listener.setblocking(False)
        #: What a rank says first: nobody else knows it.
        self.token = secrets.token_hex(16)
        self.hub = Hub(world_size, self._send)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    @property
    def port(self) -> int:
        """The port at which the ranks connect."""
        port: int = self._listener.getsockname()[1]
        return port

    def add(self, rank: int, link: Link) -> None:
        """Take the connection of a rank."""
        self._links[rank] = link
        self._selector.register(link.socket, selectors.EVENT_READ, lambda: self._read(rank, link))

    def sockets(self) -> Iterable[socket.socket]:
        """Return all sockets that are open."""
        return [self._listener, *(link.socket for link in self._links.values())]

    def close(self) -> None:
        """Close all connections. The ranks are told before that rank 0 ends."""
        for link in self._links.values():
            link.close()
        self._listener.close()

    def tell(self, message: Message) -> None:
        """Send a message to all ranks."""
        for link in list(self._links.values()):
            link.send(message)

    def _send(self, rank: int, message: Message) -> None:
        link = self._links.get(rank)
        if link is not None:
            link.send(message)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        link = Link(connection)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._greet(link))

    def _greet(self, link: Link) -> None:
        """Read the first message of a connection, which says whose it is."""
        messages = link.receive()
        if messages == []:
            return
        self._selector.unregister(link.socket)
        if not messages or messages[0].get("token") != self.token:
            link.close()
            return
        rank = int(messages[0]["hello"])
        self.add(rank, link)
        for message in messages[1:]:
            self._take(rank, message)

    def _read(self, rank: int, link: Link) -> None:
        messages = link.receive()
        if messages is None:
            self._selector.unregister(link.socket)
            link.close()
            self._links.pop(rank, None)
            self.tell({"end": self.hub.lose(rank, link.is_silent).written()})
            return
        for message in messages:
            self._take(rank, message)

    def _take(self, rank: int, message: Message) -> None:
        self.hub.receive(rank, message)
        if "ended" in message:
            self.tell({"end": message["position"]})
