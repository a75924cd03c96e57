"""The watch of one process: its thread, and its connection with rank 0."""

from __future__ import annotations

import gc
import selectors
import socket
import struct
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from nucleate.cluster.watch import gloo_sockets
from nucleate.cluster.watch.calls import CALLS, State
from nucleate.cluster.watch.link import Link, Message
from nucleate.cluster.watch.position import DIED, ENDED, SILENT, Position
from nucleate.cluster.watch.switchboard import Switchboard
from nucleate.cluster.watch.verdict import WAITS_S, Verdict, explained, judge, table
from nucleate.errors import DistributedError, RankDisagreementError, RankFailedError

_TICK_S = 0.5
_PATIENCE_S = 5.0
#: The time that a rank whose communication failed waits for the reason.
_ANSWER_S = 4.0
#: Words in the errors of transports. torch raises plain RuntimeErrors for many of them (2.13).
_TRANSPORT = ("gloo", "onnection", "Broken pipe", "imed out", "ocket", "aborted", "recvValue", "sendBytes")
_PAIR = struct.Struct("qq")


class Watcher:
    """The watch of one process over its calls.

    Args:
        rank: The number of this process among all processes.
        world_size: The number of processes.
        group: A gloo group of all ranks, on which they meet.
        store: A connection to the group's store that only the watch uses.
    """

    def __init__(self, rank: int, world_size: int, group: Any, store: Any) -> None:
        self._rank, self._world_size = rank, world_size
        self._group, self._store = group, store
        # Meetings use no operation of torch: a mode that is on, such as a recording, would see it.
        self._backend = group._get_backend(torch.device("cpu"))
        self._said, self._heard = bytearray(16), bytearray(16 * world_size)
        self._mine = torch.frombuffer(self._said, dtype=torch.int64)
        self._received = [list(torch.frombuffer(self._heard, dtype=torch.int64).view(world_size, 2).unbind())]
        self._selector = selectors.DefaultSelector()
        self._switchboard: Switchboard | None = None
        self._link: Link | None = None
        self._thread = threading.Thread(target=self._run, name="nucleate-watch", daemon=True)
        self._wake, self._woken = socket.socketpair()
        # The ends of other ranks, as rank 0 tells them.
        self._ends: dict[int, Position] = {}
        self._verdict: Verdict | None = None
        self._unexplained = ""
        self._answered = threading.Event()
        self._seen: State | None = None
        self._ticked = 0.0
        self._is_over = False

    def start(self, hosts: Sequence[str], patience: timedelta, key: str) -> None:
        """Connect with rank 0, and start the thread.

        Args:
            hosts: The names and addresses of this machine, for the other ranks.
            patience: The time in which rank 0 has to tell its port.
            key: The key in the store under which rank 0 tells it.
        """
        if self._rank == 0:
            self._switchboard = board = Switchboard(
                self._world_size, self._selector, hosts[0] if len(hosts) == 1 else ""
            )
            mine, theirs = socket.socketpair()
            board.add(0, Link(theirs))
            self._link = Link(mine)
            self._store.set(key, " ".join([str(board.port), board.token, *hosts]))
        else:
            self._store.wait([key], patience)
            port, token, *there = self._store.get(key).decode().split()
            self._link = Link.to(there, int(port), _PATIENCE_S)
            if self._link is None:
                warnings.warn(
                    f"rank {self._rank} cannot reach rank 0 at {', '.join(there)}, port {port}. A rank that waits in "
                    "vain is noticed only when the timeout of the strategy is over.",
                    stacklevel=2,
                )
                return
            self._link.send({"hello": self._rank, "token": token})
        self._selector.register(self._link.socket, selectors.EVENT_READ, self._read)
        self._selector.register(self._woken, selectors.EVENT_READ, lambda: None)
        self._thread.start()

    def refuse(self) -> None:
        """Raise the error that ended the communication of this process, if there is one."""
        if self._verdict is not None:
            raise self._error(self._verdict)

    def meet(self, number: int, name: str) -> None:
        """Wait for all ranks at the beginning of a meeting.

        Args:
            number: The number of the meeting.
            name: Its name.

        Raises:
            RankDisagreementError: The ranks have entered different meetings. All ranks raise it.
            RankFailedError: A rank has ended or died.
        """
        if name == "barrier":
            # Half the time of an exchange. gloo keeps barriers and exchanges apart, so a rank in another call makes
            # both wait, which the watch notices.
            try:
                self._backend.barrier().wait()
            except Exception as error:
                self._raise_explained(error)
            return
        _PAIR.pack_into(self._said, 0, number, zlib.crc32(name.encode()))
        try:
            self._backend.allgather(self._received, [self._mine]).wait()
            if self._heard == self._said * self._world_size:
                return
            positions: list[Any] = [None] * self._world_size
            dist.all_gather_object(positions, Position.of(self._rank, CALLS).written(), group=self._group)
        except Exception as error:
            self._raise_explained(error)
        known = [Position.read(fields) for fields in positions]
        names = sorted({one.name for one in known})
        raise RankDisagreementError(
            f"the ranks have entered different calls: {', '.join(names)}. Every rank must make the same calls, in the "
            f"same order; do not call them under `if runtime.is_global_zero`.\n{table(known)}"
        )

    def _raise_explained(self, error: Exception) -> NoReturn:
        reason = self.explain(error)
        if reason is None:
            raise error
        raise reason from reason.__cause__

    def explain(self, error: Exception) -> Exception | None:
        """Return the error for a communication that failed, or None for an error of another kind.

        Args:
            error: The error that a call has raised.
        """
        if self._verdict is None:
            text = str(error)
            is_plain = isinstance(error, (RuntimeError, ValueError)) and not isinstance(error, DistributedError)
            is_transports = isinstance(error, dist.DistError) or any(word in text for word in _TRANSPORT)
            if not is_plain or not is_transports:
                return None
            self._ask(text)
        if self._verdict is not None:
            return self._error(self._verdict)
        where = self._unexplained or table([Position.of(self._rank, CALLS)])
        failed = RankFailedError(
            f"the communication failed in {CALLS.state.name}: {str(error).splitlines()[0]}\n{where}"
        )
        # Where a verdict explains the failure, the transport's words would only hide it.
        failed.__cause__ = error
        return failed

    def end(self, reason: str) -> None:
        """Tell the other ranks that this process ends, and end the thread.

        Args:
            reason: The exception that ends it, or `""`.
        """
        if self._is_over:
            return
        position = Position.of(self._rank, CALLS, ENDED, reason).written()
        board = self._switchboard
        if board is None:
            self._say({"ended": True, "position": position})
        self._is_over = True
        if self._verdict is not None:
            # This process fails. Its interpreter ends by collections over all objects of torch, which take seconds.
            gc.freeze()
        if self._thread.ident is not None:
            self._wake.send(b"0")
            self._thread.join(2)
        if board is not None:
            board.tell({"end": position})
        self._close_sockets()

    def forget(self) -> None:
        """Close the connections of the parent in a process that was forked: they tell when the parent ends."""
        self._is_over = True
        self._close_sockets()

    def _close_sockets(self) -> None:
        if self._switchboard is not None:
            self._switchboard.close()
        if self._link is not None:
            self._link.close()
        self._wake.close()
        self._woken.close()
        self._selector.close()

    def _error(self, verdict: Verdict) -> DistributedError:
        return RankDisagreementError(verdict.text) if verdict.is_disagreement else RankFailedError(verdict.text)

    def _ask(self, text: str) -> None:
        """Ask rank 0 for the reason of a failed communication, and wait for its answer."""
        self._answered.clear()
        if 0 in self._ends or not self._say({"failed": text}):
            # Its end may be on its way.
            self._answered.wait(2 * _TICK_S)
        else:
            self._answered.wait(_ANSWER_S)
        if self._verdict is None:
            self._judge_alone(text)

    # -- the thread of the watch -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_over:
            for key, _ in self._selector.select(_TICK_S):
                key.data()
            now = time.monotonic()
            if now - self._ticked >= _TICK_S:
                self._ticked = now
                self._tick(now)

    def _tick(self, now: float) -> None:
        state = CALLS.state
        if state.kind and state is self._seen and now - state.since >= WAITS_S:
            if 0 in self._ends:
                self._judge_alone()
            else:
                self._say({"waits": True})
        self._seen = state
        if self._switchboard is not None:
            self._switchboard.hub.tick(now)

    def _read(self) -> None:
        link = self._link
        assert link is not None
        messages = link.receive()
        if messages is None:
            self._selector.unregister(link.socket)
            self._ends.setdefault(0, Position(0, end=SILENT if link.is_silent else DIED))
            return
        for message in messages:
            self._take(message)

    def _take(self, message: Message) -> None:
        if "where" in message:
            self._say({})
        elif "end" in message:
            position = Position.read(message["end"])
            self._ends[position.rank] = position
        elif "long" in message:
            _print(message["long"])
        elif "unexplained" in message:
            self._unexplained = message["unexplained"]
            self._answered.set()
        elif "verdict" in message:
            self._close(Verdict(*message["verdict"]))

    def _judge_alone(self, failed: str = "") -> None:
        """Judge without rank 0, which has ended: every rank would need it in its next call."""
        own = Position.of(self._rank, CALLS)
        known = sorted([own, *self._ends.values()], key=lambda one: one.rank)
        verdict = judge(known)
        if verdict is None and failed:
            verdict = explained(known, self._rank, failed)
        if verdict is not None:
            self._close(verdict)

    def _close(self, verdict: Verdict) -> None:
        """End the communication of this process. Ranks that wait for it wake, and raise the verdict."""
        if self._verdict is not None:
            return
        self._verdict = verdict
        self._answered.set()
        prefix = CALLS.waits_for
        try:
            if prefix:
                self._store.compare_set(f"{prefix}/failed", "", f"{self._rank}\n{verdict.text}")
                self._store.set(f"{prefix}/done", "failed")
            gloo_sockets.shut_down()
            # Other backends can abort what waits in this process.
            if dist.is_initialized() and (dist.get_backend() != "gloo" or sys.platform != "linux"):
                dist.distributed_c10d._abort_process_group()
        except Exception as error:
            _print(f"closing the process groups of rank {self._rank} failed: {error}")

    def _say(self, message: Message) -> bool:
        """Send a message with the position of this rank to rank 0, and return False if rank 0 is gone."""
        message = {"position": Position.of(self._rank, CALLS).written(), **message}
        return self._link is not None and self._link.send(message)


def _print(text: str) -> None:
    sys.stderr.write(f"nucleate: {text}\n")
    sys.stderr.flush()
