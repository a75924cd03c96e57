"""Rules that only change names: a tensor gets another name or several names, or is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nucleate.checkpoint.rules.pattern import Pattern, check_new_name, new_name
from nucleate.checkpoint.rules.rule import Move, Rule, listed


@dataclass(frozen=True)
class Rename(Rule):
    """A rule that gives a tensor one or several new names. With an empty `new`, it leaves the tensor out."""

    pattern: Pattern
    new: tuple[str, ...]

    def __post_init__(self) -> None:
        for new in self.new:
            check_new_name(new, (self.pattern,))

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        return (self.pattern,)

    def moves(self, names: Sequence[str]) -> list[Move]:
        found = [(name, captures) for name in names if (captures := self.pattern.match(name)) is not None]
        return [
            Move((name,), tuple(new_name(new, captures, self.pattern) for new in self.new)) for name, captures in found
        ]

    def inverse(self) -> Rule:
        self.refuse_regex()
        if not self.new:
            raise self.refuse_inverse("the tensors that it leaves out are lost")
        template = Pattern(self.new[0])
        if (template.num_stars, template.names) != (self.pattern.num_stars, self.pattern.names):
            raise self.refuse_inverse("its new name lacks a wildcard of the old one")
        rule = Rename(template, (self.pattern.text,), optional=self.optional)
        return (
            rule if len(self.new) == 1 else _FirstOf(rule.pattern, rule.new, rest=self.new[1:], optional=rule.optional)
        )

    def __str__(self) -> str:
        return f"rename({listed(self.patterns)}, {listed(self.new)})" if self.new else f"drop({str(self.pattern)!r})"


@dataclass(frozen=True)
class _FirstOf(Rename):
    """The inverse of a rename to several names: it takes the first name, or the next name if the first is missing."""

    rest: tuple[str, ...] = ()

    def moves(self, names: Sequence[str]) -> list[Move]:
        left: dict[str, Move] = {}
        for pattern in (self.pattern, *map(Pattern, self.rest)):
            for name in names:
                captures = pattern.match(name)
                if captures is not None:
                    result = new_name(self.new[0], captures, pattern)
                    # Further names stand for the same tensor.
                    left[name] = Move((name,), () if any(result in m.results for m in left.values()) else (result,))
        return list(left.values())

    def inverse(self) -> Rule:
        return Rename(Pattern(self.new[0]), (self.pattern.text, *self.rest), optional=self.optional)
