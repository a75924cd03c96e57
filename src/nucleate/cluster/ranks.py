"""Ranks that do something together, whatever they talk over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import TypeVar

T = TypeVar("T")


class Ranks(ABC):
    """Processes of one job. Every method must be called by every rank, in the same order."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """This process among all."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """How many processes there are."""

    @abstractmethod
    def gather_objects(self, obj: T) -> list[T]:
        """Return every rank's object, by rank. It is pickled."""

    @abstractmethod
    def broadcast(self, obj: T) -> T:
        """Return rank 0's object; the others' is ignored. It is pickled."""

    @abstractmethod
    def all_or_none(self, what: str) -> AbstractContextManager[None]:
        """Surround work that every rank must finish, so that a rank's failure is an error on all of them.

        Args:
            what: What is being done, for the message.

        Raises:
            RankFailedError: Another rank failed.
        """
