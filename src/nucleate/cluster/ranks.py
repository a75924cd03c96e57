"""The interface of ranks that work together, for any kind of communication."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import TypeVar

T = TypeVar("T")


class Ranks(ABC):
    """The ranks of one job. Every rank must call every method, in the same order."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """The number of this process among all processes."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """The number of processes."""

    @abstractmethod
    def gather_objects(self, obj: T) -> list[T]:
        """Return every rank's object, by rank. The objects are pickled."""

    @abstractmethod
    def broadcast(self, obj: T) -> T:
        """Return rank 0's object and ignore those of other ranks. The object is pickled."""

    @abstractmethod
    def all_or_none(self, what: str) -> AbstractContextManager[None]:
        """Surround work that every rank must finish, so that a failure of one rank is an error on all ranks.

        Args:
            what: The name of the work, for the message.

        Raises:
            RankFailedError: Another rank failed.
        """
