"""Globs and regular expressions on names, and the names that are made of what they capture."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nucleate.checkpoint import rename
from nucleate.checkpoint.rules.pattern import Pattern, new_name
from nucleate.errors import ConfigurationError

PART = st.text("abc_0123", min_size=1, max_size=4)


@pytest.mark.parametrize(
    ("pattern", "new", "name", "expected"),
    [
        ("a.*.w", "b.*.w", "a.3.w", "b.3.w"),
        ("a.*.w", "b.*.w", "a.3.4.w", None),
        ("a.**", "b.**", "a.3.4.w", "b.3.4.w"),
        ("a.*.*", "*.x.*", "a.3.w", "3.x.w"),
        ("h.{i}.{kind}", "{kind}.{i}", "h.7.bias", "bias.7"),
        ("h.{i}.{i}", "{i}", "h.7.8", None),
        ("h.{i}.{i}", "{i}", "h.7.7", "7"),
        ("a+b.w", "c", "a+b.w", "c"),
        ("a+b.w", "c", "aab.w", None),
        ("w", "v", "w.w", None),
        (re.compile(r"h\.(\d+)\.(?P<kind>\w+)"), r"\g<kind>.\1", "h.7.bias", "bias.7"),
        (re.compile(r"h\.(\d+)"), r"x.\1", "h.7.bias", None),
    ],
)
def test_a_name_becomes_another(pattern: str | re.Pattern[str], new: str, name: str, expected: str | None) -> None:
    found = Pattern.of(pattern)
    captures = found.match(name)
    assert (None if captures is None else new_name(new, captures, found)) == expected


@given(st.lists(PART, min_size=2, max_size=2))
def test_a_glob_finds_the_names_that_it_makes(parts: list[str]) -> None:
    pattern, other = Pattern("a.{x}.b.{y}"), Pattern("{y}.c.{x}")
    name = f"a.{parts[0]}.b.{parts[1]}"
    captures = pattern.match(name)
    assert captures is not None
    new = other.fill(captures)
    assert new == f"{parts[1]}.c.{parts[0]}"
    back = other.match(new)
    assert back is not None
    assert pattern.fill(back) == name


@pytest.mark.parametrize(
    ("pattern", "new", "message"),
    [
        ("a.*", "b.*.*", r"'b\.\*\.\*' cannot be made from 'a\.\*': it has more stars"),
        ("a.{i}", "b.{j}", r"it has \{j\}"),
        (re.compile("a(b)"), r"\2", r"has the group 2"),
        (re.compile("a(?P<x>b)"), r"\g<y>", r"has the group y"),
        ("", "b", r"'' is not a pattern"),
        ("a.{0}", "b", r"begins with a letter"),
        ("a", "", r"'' is not a new name"),
    ],
)
def test_a_new_name_that_cannot_be_made_is_refused_at_once(
    pattern: str | re.Pattern[str], new: str, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        rename(pattern, new)
