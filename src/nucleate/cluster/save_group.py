"""What the ranks that save together say to one another, on a process group of its own.

A save may run in the background while training goes on: its messages must never meet training's. The group is gloo's,
which notices at once when a process at the other end is gone; a save must not wait minutes for a rank that was killed.
"""

from __future__ import annotations

import atexit
import contextlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from nucleate.cluster.communicator import Communicator
from nucleate.cluster.process_group import gloo_beside
from nucleate.cluster.ranks import Ranks
from nucleate.errors import RankFailedError

T = TypeVar("T")

# One rank may write for long while the others wait. Who is killed is noticed without it.
_TIMEOUT = timedelta(hours=3)

_current: SaveGroup | None = None


class SaveGroup(Ranks):
    """The ranks of a save. Every method must be called by every rank, in the same order, from one thread at a time.

    Args:
        rank: This process among all.
        world_size: How many there are.
        process_group: torch's group; None for a single process.

    Attributes:
        process_group: The same; None also when the connections were closed.
    """

    def __init__(self, rank: int, world_size: int, process_group: Any) -> None:
        self._rank = rank
        self._world_size = world_size
        self.process_group = process_group
        self._is_broken = False
        self._default = dist.group.WORLD if world_size > 1 else None

    @classmethod
    def of(cls, communicator: Communicator, message: T) -> tuple[SaveGroup, T]:
        """Return the group of all ranks, made at the first save, and rank 0's message.

        Args:
            communicator: All ranks; one collective of it is used.
            message: Whatever rank 0 has to tell; the others' is ignored.
        """
        global _current
        if communicator.world_size == 1:
            return cls(0, 1, None), message
        usable = _current is not None and not _current._is_broken and _current._default is dist.group.WORLD
        said = communicator.gather_objects((usable, message if communicator.rank == 0 else None))
        if not all(usable for usable, _ in said):
            if _current is not None:
                _current._give_up()
            # No rank starts to wait for the others here before all of them have come.
            group = dist.new_group(backend=gloo_beside(dist.group.WORLD), timeout=_TIMEOUT)
            _current = cls(communicator.rank, communicator.world_size, group)
            # Before the groups end: what keeps one alive keeps its threads alive beyond the interpreter's end.
            atexit.register(_forget)
        assert _current is not None
        first = said[0][1]
        assert first is not None
        return _current, first

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def gather_objects(self, obj: T) -> list[T]:
        """Return every rank's object, by rank.

        Raises:
            RankFailedError: A rank is gone.
        """
        if self.world_size == 1:
            return [obj]
        gathered: list[Any] = [None] * self.world_size
        with self.noticing():
            dist.all_gather_object(gathered, obj, group=self.process_group)
        return gathered

    def broadcast(self, obj: T) -> T:
        """Return rank 0's object; the others' is ignored.

        Raises:
            RankFailedError: A rank is gone.
        """
        if self.world_size == 1:
            return obj
        message = [obj]
        with self.noticing():
            dist.broadcast_object_list(message, src=0, group=self.process_group)
        return message[0]

    @contextmanager
    def all_or_none(self, what: str) -> Iterator[None]:
        """Surround work that every rank must finish, so that a rank's failure is an error on all of them.

        Args:
            what: What is being done, for the message.

        Raises:
            RankFailedError: Another rank failed or is gone.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.world_size == 1:
                raise
            failure = error
        except BaseException:
            # Somebody wants this process to end now. The others notice.
            self._give_up()
            raise
        mine = None if failure is None else "".join(traceback.format_exception(failure))
        try:
            everyone = self.gather_objects(mine)
        except RankFailedError as error:
            if failure is not None:
                raise failure from None
            raise RankFailedError(f"{what}: {error}") from error
        first = next(((rank, text) for rank, text in enumerate(everyone) if text is not None), None)
        if failure is not None:
            assert first is not None
            if first[0] != self.rank and not isinstance(failure, RankFailedError):
                failure.add_note(f"Rank {first[0]} failed as well while all ranks did: {what}.\n{first[1]}")
            raise failure
        if first is not None:
            raise RankFailedError(f"{what} failed on rank {first[0]}:\n{first[1]}")

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """Surround collectives of this group, so that a rank that is gone is told as that.

        Raises:
            RankFailedError: A rank is gone.
        """
        try:
            yield
        # What gloo raises when a connection breaks has no better class (2.13).
        except (RuntimeError, ValueError) as error:
            self._give_up()
            raise RankFailedError(f"another rank ended, or cannot be reached any more ({error}).") from error

    def _give_up(self) -> None:
        """Close all connections, so that ranks that wait for this one fail as well."""
        if self._is_broken or self.world_size == 1:
            return
        self._is_broken = True
        with contextlib.suppress(Exception):
            dist.destroy_process_group(self.process_group)
        self.process_group = None


def _forget() -> None:
    global _current
    _current = None
