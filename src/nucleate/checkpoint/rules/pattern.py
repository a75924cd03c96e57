"""Patterns: they find the names that a rule applies to, and make the new names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from nucleate.errors import ConfigurationError

#: A glob, or a compiled regular expression.
PatternLike: TypeAlias = "str | re.Pattern[str]"

_WILDCARDS = re.compile(r"\*\*|\*|\{(\w+)\}")


@dataclass(frozen=True)
class Captures:
    """The parts of one name that the wildcards of a pattern match.

    Attributes:
        stars: The part that each `*` matches, in order.
        named: The part that each `{name}` matches.
    """

    stars: tuple[str, ...]
    named: tuple[tuple[str, str], ...]

    def without(self, name: str | None) -> Captures:
        """Return the captures without the wildcard `name`, or without the last star if `name` is None."""
        if name is None:
            return Captures(self.stars[:-1], self.named)
        return Captures(self.stars, tuple(pair for pair in self.named if pair[0] != name))

    def plus(self, name: str | None, value: str) -> Captures:
        """Return the captures with one more wildcard: `{name}`, or a last star if `name` is None."""
        if name is None:
            return Captures((*self.stars, value), self.named)
        return Captures(self.stars, (*self.named, (name, value)))

    def __str__(self) -> str:
        return ", ".join([*self.stars, *(f"{name}={value}" for name, value in self.named)]) or "nothing"


@dataclass(frozen=True)
class Pattern:
    r"""A glob or a regular expression on names, or the template of a new name.

    In a glob, `*` and `{name}` match a part of a name without dots, and `**` matches anything. In a new name, they
    repeat the parts of the old name: a star repeats the star at the same place, `{name}` the part of the same name.
    A new name after a regular expression has `\1` and `\g<name>` for its groups, as for `re.sub`.

    Attributes:
        text: The glob, or the regular expression.
        is_regex: Whether `text` is a regular expression.
    """

    text: str
    is_regex: bool = False

    @classmethod
    def of(cls, pattern: PatternLike | Pattern) -> Pattern:
        """Return the pattern that a user wrote.

        Raises:
            ConfigurationError: `pattern` is neither a glob nor a regular expression.
        """
        if isinstance(pattern, Pattern):
            return pattern
        if isinstance(pattern, re.Pattern):
            return cls(pattern.pattern, True)
        if not isinstance(pattern, str) or not pattern:
            raise ConfigurationError(
                f"{pattern!r} is not a pattern. Give a glob, such as 'layers.{{i}}.*.weight', or `re.compile(...)`."
            )
        found = cls(pattern)
        _ = found._expression  # A wrong glob raises its error now.
        return found

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        if self.is_regex:
            return re.compile(self.text)
        parts: list[str] = []
        done, seen = 0, set[str]()
        for wildcard in _WILDCARDS.finditer(self.text):
            parts.append(re.escape(self.text[done : wildcard.start()]))
            name = wildcard[1]
            if name in seen:
                parts.append(f"(?P={name})")
            elif name is not None:
                if not name.isidentifier():
                    raise ConfigurationError(f"{self.text!r} has {{{name}}}; a name in braces begins with a letter.")
                seen.add(name)
                parts.append(f"(?P<{name}>[^.]+)")
            else:
                parts.append("(.+)" if wildcard[0] == "**" else "([^.]+)")
            done = wildcard.end()
        return re.compile("".join([*parts, re.escape(self.text[done:])]))

    @property
    def num_stars(self) -> int:
        """The number of stars, or of groups without names."""
        return self._expression.groups - len(self._expression.groupindex)

    @property
    def names(self) -> frozenset[str]:
        """The names in braces, or the names of groups."""
        return frozenset(self._expression.groupindex)

    def match(self, name: str) -> Captures | None:
        """Return the parts that the wildcards match, or None if `name` does not match this pattern."""
        found = self._expression.fullmatch(name)
        if found is None:
            return None
        named = found.groupdict()
        numbers = set(self._expression.groupindex.values())
        stars = tuple(text or "" for number, text in enumerate(found.groups(), 1) if number not in numbers)
        return Captures(stars, tuple(sorted((key, text or "") for key, text in named.items())))

    def fill(self, captures: Captures) -> str | None:
        """Return the name with the wildcards replaced, or None for a regular expression, which cannot make a name."""
        if self.is_regex:
            return None
        stars, named = iter(captures.stars), dict(captures.named)
        return _WILDCARDS.sub(lambda wildcard: named[wildcard[1]] if wildcard[1] else next(stars), self.text)

    def __str__(self) -> str:
        return self.text


def new_name(new: str, captures: Captures, after: Pattern) -> str:
    """Return a new name.

    Args:
        new: The template of the new name.
        captures: The parts that the wildcards of the old name match.
        after: The pattern of the old name.
    """
    if not after.is_regex:
        filled = Pattern(new).fill(captures)
        assert filled is not None
        return filled
    groups: Mapping[str, str] = dict(captures.named)

    def group(found: re.Match[str]) -> str:
        key = found[1] or found[2]
        return captures.stars[int(key) - 1] if key.isdigit() else groups[key]

    return re.sub(r"\\(\d)|\\g<(\w+)>", group, new)


def check_new_name(new: str, patterns: tuple[Pattern, ...], index: bool = False) -> str | None:
    """Make sure that a new name can be made from the captures of the old names.

    Args:
        new: The template of the new name.
        patterns: The patterns of the old names.
        index: Whether the new name may lack one wildcard of the old name, which is then an index.

    Returns:
        The name of the wildcard that is the index. Empty if the last star is the index, and None without an index.

    Raises:
        ConfigurationError: The captures of the old names do not make the new name.
    """
    if not isinstance(new, str) or not new:
        raise ConfigurationError(f"{new!r} is not a new name; it must be a string.")
    first = patterns[0]
    if any((each.num_stars, each.names) != (first.num_stars, first.names) for each in patterns):
        raise ConfigurationError(
            f"{', '.join(repr(str(each)) for each in patterns)} are joined, so they must have the same wildcards."
        )
    if any(each.is_regex for each in patterns):
        try:
            fields = {found[0] or found[1] for found in re.findall(r"\\(\d)|\\g<(\w+)>", new)}
        except re.error as error:  # pragma: no cover - the expression is ours
            raise ConfigurationError(str(error)) from error
        unknown = [key for key in fields if (int(key) > first.num_stars if key.isdigit() else key not in first.names)]
        if unknown:
            raise ConfigurationError(f"{new!r} has the group {unknown[0]}, which {str(first)!r} does not have.")
        return None
    template = Pattern.of(new)
    unknown_names = template.names - first.names
    missing = first.names - template.names
    stars = first.num_stars - template.num_stars
    if not unknown_names and stars >= 0:
        if index and len(missing) + stars == 1:
            return next(iter(missing), "")
        if index and not missing and not stars:
            return None
        if not index:
            return None
    raise ConfigurationError(
        f"{new!r} cannot be made from {str(first)!r}: "
        + (
            f"it has {{{next(iter(unknown_names))}}}, which the old name does not have."
            if unknown_names
            else "it has more stars than the old name."
            if stars < 0
            else "more than one wildcard is missing in it, so it would be the name of several results."
        )
    )
