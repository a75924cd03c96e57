"""The benchmark of when deferring pays: its models, its rule and its picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.when import SIZES, num_parameters, shape
from tests.bench.when_section import KINDS, Point, Setting, rule, smallest, when

# A process for each way, on machines that do other things, too.
pytestmark = pytest.mark.timeout(900)


def test_deferred_models_of_every_size_are_eagers_and_the_picture_is_drawn(tmp_path: Path) -> None:
    section = when(1, ["1m"], ["touched"], [1])
    assert section.faults == []
    # Eager and deferred, few and many, in two dtypes; a cast; and twice without an answer.
    assert len(section.series) == 2 * 2 * 2 + 1 + 2
    for text in ("**The rule", "| many small | bf16 | 1 | touched | ", "ns for each element"):
        assert text in section.text
    pytest.importorskip("matplotlib")
    assert section.draw is not None
    section.draw(tmp_path)
    text = (tmp_path / "when-deferring-pays.svg").read_text()
    assert all(f"{words} tensors, bf16" in text for words in KINDS.values())


def test_models_of_few_and_of_many_tensors_have_the_size_that_is_said() -> None:
    for kind in KINDS:
        for size, wanted in SIZES.items():
            assert 0.98 * wanted < num_parameters(kind, size) < 1.02 * wanted
    assert shape("many", "1m") == (240, 64)
    assert shape("many", "2b")[0] == 1000


def point(kind: str, size: str, eager_s: float, deferred_s: float, state: str = "touched") -> Point:
    seconds = {"eager": eager_s, "nucleate": deferred_s}
    return Point(Setting(kind, "fp32", 1, state), size, seconds, dict.fromkeys(seconds, 4e6))


def test_the_rule_is_the_size_from_which_on_no_setting_is_slower() -> None:
    points = [
        point("few", "1m", 1.0, 3.0),
        point("few", "4m", 1.0, 0.9),
        point("few", "16m", 1.0, 0.5),
        point("few", "1m", 1.0, 0.9, "untouched"),
        point("few", "4m", 1.0, 2.0, "untouched"),
        point("few", "16m", 1.0, 1.04, "untouched"),
    ]
    assert smallest(points, lambda each: each.num_parameters) == num_parameters("few", "16m")
    assert "weights of a model have 1 million elements or more" in rule(points)
    assert "For few large tensors it pays from 16 million parameters on" in rule(points)
    slow = [*points, point("few", "64m", 1.0, 1.1)]
    assert smallest(slow, lambda each: each.num_parameters) is None
    assert "there is no size from which on deferring pays" in rule(slow)
