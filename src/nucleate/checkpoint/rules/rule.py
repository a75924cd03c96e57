"""Rules: what is done to tensors by name while they are loaded, saved or converted.

A rule says which names it is about and what becomes of the tensors. It is plain data: applied to names, it gives moves,
each of some tensors into others. A move is torch code that only moves elements, so it is recorded on stand-ins of a
file's tensors, and it can be undone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nucleate.checkpoint.rules.pattern import Pattern
from nucleate.errors import ConfigurationError

#: Makes results of sources.
Forward = Callable[[list[Tensor]], list[Tensor]]
#: Makes the sources again, given their shapes.
Backward = Callable[[list[Tensor], list[tuple[int, ...]]], list[Tensor]]


@dataclass(frozen=True)
class Move:
    """The work of a rule on some tensors.

    Attributes:
        sources: Their names.
        results: The names of what it makes of them.
        forward: Makes it; None where one tensor is only called otherwise, or is left out.
        backward: Undoes it.
    """

    sources: tuple[str, ...]
    results: tuple[str, ...]
    forward: Forward | None = None
    backward: Backward = field(default=lambda tensors, shapes: tensors)


@dataclass(frozen=True)
class CountedMove(Move):
    """A move into as many tensors as the source's shape says.

    Attributes:
        names: The names of so many results.
    """

    names: Callable[[int], tuple[str, ...]] = field(default=lambda count: ())


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """A rule on tensors by name. See `rename`, `concatenate`, `stack`, `split`, `transpose` and `permute_heads`.

    Attributes:
        optional: Whether it may find nothing.
    """

    optional: bool = False

    @abstractmethod
    def moves(self, names: Sequence[str]) -> list[Move]:
        """Return what it does to tensors of these names.

        Raises:
            CheckpointKeyError: Of the tensors that belong together, some are missing.
        """

    @abstractmethod
    def inverse(self) -> Rule:
        """Return the rule that undoes it.

        Raises:
            ConfigurationError: The rule loses something, or does not say enough.
        """

    @property
    @abstractmethod
    def patterns(self) -> tuple[Pattern, ...]:
        """The patterns of the names that it is about."""

    def refuse_inverse(self, why: str) -> ConfigurationError:
        return ConfigurationError(f"{self} cannot be undone: {why}.")

    def refuse_regex(self) -> None:
        if any(pattern.is_regex for pattern in self.patterns):
            raise self.refuse_inverse("a regular expression says no name. Write it as a glob")


def listed(names: Iterable[object]) -> str:
    """Return names as a user would write them: one, or a list."""
    texts = [repr(str(name)) for name in names]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
