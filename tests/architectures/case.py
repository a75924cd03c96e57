"""A case: one model that can be made again and again. A family: the cases that one package gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn


class NotBuildable(Exception):  # noqa: N818
    """Nothing was found with which the constructor works eagerly; the message is what it says."""


@dataclass(slots=True)
class Case:
    """One model.

    Attributes:
        make: Constructs it; called several times, each time from the same random state.
        note: What had to be changed to make it small enough, for the report.
        forward: Runs it on a fixed input, if the outputs are to be compared as well.
        by_hand: Makes what the constructor leaves on the meta device, as users do; `setup` has to come to the same.
    """

    make: Callable[[], nn.Module]
    note: dict[str, object] = field(default_factory=dict)
    forward: Callable[[nn.Module], Tensor] | None = None
    by_hand: Callable[[nn.Module], None] | None = None


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
