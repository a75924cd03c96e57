"""A case: one model that can be made again and again. A family: the cases that one package gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn


class NotBuildable(Exception):  # noqa: N818
    """Nothing was found with which the constructor works eagerly; the message is what it says."""


@dataclass(slots=True)
class Case:
    """One model.

    Attributes:
        make: Constructs it; called several times, each time from the same random state.
        note: What had to be changed to make it small enough, for the report.
    """

    make: Callable[[], nn.Module]
    note: dict[str, object] = field(default_factory=dict)


class Family(ABC):
    """The models of one package."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return the name of every case, without making any."""

    @abstractmethod
    def case(self, name: str) -> Case:
        """Return a case that works eagerly.

        Raises:
            NotBuildable: There is none.
        """
