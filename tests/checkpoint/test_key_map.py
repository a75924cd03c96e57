"""Other names for keys: expressions, functions, several of them, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nucleate.checkpoint import add_prefix, strip_prefix
from nucleate.checkpoint.rules.key_map import map_keys
from nucleate.errors import CheckpointKeyError, ConfigurationError


@pytest.mark.parametrize(
    ("key_map", "expected"),
    [
        (None, {"m.a.w": "m.a.w", "m.b.w": "m.b.w", "x": "x"}),
        ({r"^m\.": ""}, {"a.w": "m.a.w", "b.w": "m.b.w", "x": "x"}),
        ({r"^m\.(\w)": r"n.\1\1", "x$": "y"}, {"n.aa.w": "m.a.w", "n.bb.w": "m.b.w", "y": "x"}),
        (strip_prefix("m."), {"a.w": "m.a.w", "b.w": "m.b.w"}),
        (add_prefix("q."), {"q.m.a.w": "m.a.w", "q.m.b.w": "m.b.w", "q.x": "x"}),
        (lambda key: key.upper() if key != "x" else None, {"M.A.W": "m.a.w", "M.B.W": "m.b.w"}),
        ([strip_prefix("m."), {"w": "weight"}], {"a.weight": "m.a.w", "b.weight": "m.b.w"}),
    ],
)
def test_keys_get_new_names(key_map: Any, expected: dict[str, str]) -> None:
    assert map_keys(["m.a.w", "m.b.w", "x"], key_map) == expected


@given(st.lists(st.text(min_size=1), unique=True), st.text())
def test_a_prefix_put_on_and_taken_off_changes_nothing(keys: list[str], prefix: str) -> None:
    assert map_keys(keys, [add_prefix(prefix), strip_prefix(prefix)]) == {key: key for key in keys}


def test_two_keys_of_one_name_are_refused_with_both() -> None:
    with pytest.raises(CheckpointKeyError, match=r"a\.w and b\.w both become w"):
        map_keys(["a.w", "b.w"], {r"^\w\.": ""})


@pytest.mark.parametrize(
    ("key_map", "message"),
    [
        ("model.", "'model.' is not a key map"),
        ({"(": ""}, "is not a regular expression"),
        ({"a": r"\2"}, "is not a regular expression"),
        (lambda key: 3, "a key map returned 3 for 'w'"),
        (7, "7 is not a key map"),
    ],
)
def test_what_is_no_key_map_is_refused(key_map: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message.replace("(", r"\(")):
        map_keys(["w"], key_map)
