"""The communication of ranks that save together, on a process group of its own.

A save may run in the background while training continues, so its messages must never mix with those of training. The
group uses gloo, which notices at once when another process has ended. A save must not wait minutes for a killed rank.
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

# One rank may write for long while the others wait. gloo notices a killed rank without this timeout.
_TIMEOUT = timedelta(hours=3)

_current: SaveGroup | None = None


class SaveGroup(Ranks):
    """The ranks of a save. Every rank must call every method, in the same order, from one thread at a time.

    Args:
        rank: The number of this process among all processes.
        world_size: The number of processes.
        process_group: torch's group; None for a single process.

    Attributes:
        process_group: torch's group; None for a single process, and after the connections were closed.
    """

    def __init__(self, rank: int, world_size: int, process_group: Any) -> None:
        self._rank = rank
        self._world_size = world_size
        self.process_group = process_group
        self._is_broken = False
        self._default = dist.group.WORLD if world_size > 1 else None

    @classmethod
    def of(cls, communicator: Communicator, message: T) -> tuple[SaveGroup, T]:
        """Return the group of all ranks, which the first save makes, and rank 0's message.

        Args:
            communicator: The communicator of all ranks, used for one collective.
            message: The message of rank 0. Those of other ranks are ignored.
        """
        global _current
        if communicator.world_size == 1:
            return cls(0, 1, None), message
        usable = _current is not None and not _current._is_broken and _current._default is dist.group.WORLD
        said = communicator.gather_objects((usable, message if communicator.rank == 0 else None))
        if not all(usable for usable, _ in said):
            if _current is not None:
                _current._give_up()
            # All ranks have reached this place, so no rank waits long for the others in `new_group`.
            group = dist.new_group(backend=gloo_beside(dist.group.WORLD), timeout=_TIMEOUT)
            _current = cls(communicator.rank, communicator.world_size, group)
            # This runs before the groups end. A reference to a group would keep the group's threads alive beyond the
            # end of the interpreter.
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
        """Return rank 0's object and ignore those of other ranks.

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
        """Surround work that every rank must finish, so that a failure of one rank is an error on all ranks.

        Args:
            what: The name of the work, for the message.

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
            # This process has to end now. The other ranks notice the closed connections.
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
                failure.add_note(f"Rank {first[0]} failed as well in the same work: {what}.\n{first[1]}")
            raise failure
        if first is not None:
            raise RankFailedError(f"{what} failed on rank {first[0]}:\n{first[1]}")

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """Surround collectives of this group, and raise the right error for a rank that is gone.

        Raises:
            RankFailedError: A rank is gone.
        """
        try:
            yield
        # gloo raises no more specific class when a connection breaks (2.13).
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
