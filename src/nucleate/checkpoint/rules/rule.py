"""The base of rules, which change tensors by name while they are loaded, saved or converted.

A rule has patterns for the names that it applies to, and describes the change of the tensors. It is plain data. Applied
to names, it returns moves, and each move makes some tensors into others. A move is torch code that only moves elements.
So the move can be recorded on stand-ins of a file's tensors, and it can be undone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nucleate.checkpoint.rules.pattern import Pattern
from nucleate.errors import ConfigurationError

#: Makes the results from the sources.
Forward = Callable[[list[Tensor]], list[Tensor]]
#: Makes the sources again, given their shapes.
Backward = Callable[[list[Tensor], list[tuple[int, ...]]], list[Tensor]]


@dataclass(frozen=True)
class Move:
    """The work of a rule on some tensors.

    Attributes:
        sources: The names of these tensors.
        results: The names of the results.
        forward: Makes the results; None if one tensor only gets another name, or is left out.
        backward: Makes the sources again.
    """

    sources: tuple[str, ...]
    results: tuple[str, ...]
    forward: Forward | None = None
    backward: Backward = field(default=lambda tensors, shapes: tensors)


@dataclass(frozen=True)
class CountedMove(Move):
    """A move whose number of results depends on the source's shape.

    Attributes:
        names: Returns the names for a number of results.
    """

    names: Callable[[int], tuple[str, ...]] = field(default=lambda count: ())


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """A rule on tensors by name. See `rename`, `concatenate`, `stack`, `split`, `transpose` and `permute_heads`.

    Attributes:
        optional: Whether the rule may find no tensors.
    """

    optional: bool = False

    @abstractmethod
    def moves(self, names: Sequence[str]) -> list[Move]:
        """Return the moves for tensors of these names.

        Raises:
            CheckpointKeyError: Some of the tensors that belong together are missing.
        """

    @abstractmethod
    def inverse(self) -> Rule:
        """Return the rule that undoes this rule.

        Raises:
            ConfigurationError: This rule loses something, or lacks an argument that the inverse needs.
        """

    @property
    @abstractmethod
    def patterns(self) -> tuple[Pattern, ...]:
        """The patterns of the names that the rule applies to."""

    def refuse_inverse(self, why: str) -> ConfigurationError:
        return ConfigurationError(f"{self} cannot be undone: {why}.")

    def refuse_regex(self) -> None:
        if any(pattern.is_regex for pattern in self.patterns):
            raise self.refuse_inverse("a regular expression cannot make a name. Write it as a glob")


def listed(names: Iterable[object]) -> str:
    """Return the text of names as a user would write them: one name, or a list."""
    texts = [repr(str(name)) for name in names]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
