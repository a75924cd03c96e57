"""Rules in TOML, for the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from nucleate.checkpoint import (
    concatenate,
    drop,
    permute_heads,
    read_rules,
    rename,
    split,
    stack,
    transpose,
    unstack,
)
from nucleate.errors import ConfigurationError

TEXT = """
[[rule]]
rename = "a"
to = ["b", "c"]

[[rule]]
drop = "*.inv_freq"
optional = true

[[rule]]
concatenate = ["h.{i}.q", "h.{i}.k"]
to = "h.{i}.qk"
sizes = [4, 1]
groups = 2

[[rule]]
stack = "e.*.w"
to = "e.w"
dim = 1

[[rule]]
split = "re:x(.)"
to = ['y\\1', 'z\\1']
dim = -1

[[rule]]
unstack = "u"
to = "u.*"

[[rule]]
transpose = "t"

[[rule]]
permute_heads = "p"
num_heads = 8
layout = "interleaved"
"""


def test_every_rule_can_be_written_in_a_file(tmp_path: Path) -> None:
    import re

    (tmp_path / "map.toml").write_text(TEXT)
    assert read_rules(tmp_path / "map.toml") == [
        rename("a", "b", "c"),
        drop("*.inv_freq", optional=True),
        concatenate(["h.{i}.q", "h.{i}.k"], "h.{i}.qk", sizes=[4, 1], groups=2),
        stack("e.*.w", "e.w", dim=1),
        split(re.compile("x(.)"), [r"y\1", r"z\1"], dim=-1),
        unstack("u", "u.*"),
        transpose("t"),
        permute_heads("p", 8, to="interleaved"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rule = ", "cannot be read as rules in TOML"),
        ("[rules]", "must consist of [[rule]] tables, and has rules."),
        ("[[rule]]\nmove = 'a'", "rule 1 in "),
        ("[[rule]]\nrename = 'a'\nto = 'b'\n[[rule]]\nrename = 'a'\ndrop = 'b'", "rule 2 in "),
        ("[[rule]]\nrename = 'a'\nto = 'b'\ndim = 1", "has dim; rename takes optional, to."),
        ("[[rule]]\nrename = 'a'", "None is not a new name"),
        ("[[rule]]\nstack = 'a.*'", "stack needs `to`, the name of its result."),
        ("[[rule]]\nrename = 're:('\nto = 'b'", "is not a regular expression"),
        ("[[rule]]\npermute_heads = 'a'", "num_heads"),
    ],
)
def test_a_file_that_is_none_is_refused_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "map.toml").write_text(text)
    with pytest.raises(ConfigurationError) as error:
        read_rules(tmp_path / "map.toml")
    assert message in str(error.value)
    assert "map.toml" in str(error.value)


def test_a_file_that_is_not_there_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        read_rules(tmp_path / "gone.toml")
