"""The section on first use: a tiny Llama in fresh processes."""

from __future__ import annotations

import pytest

from tests.bench.first_use_section import first_use
from tests.bench.measure import Series


def test_a_first_llama_is_measured_and_equals_eagers() -> None:
    section = first_use("micro", 1, idle_s=0)
    assert section.faults == []
    assert {name: one.failure for name, one in section.series.items()} == dict.fromkeys(("eager", "meta", "nucleate"))
    assert "| yes |" in section.text
    assert "1.1 x eager's import + 0.35 x eager's first model | ≤ 1 | " in section.text
    for one in section.series.values():
        assert one.median("import_s") > one.median("second_s")


def test_a_first_llama_that_is_not_eagers_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    times = dict.fromkeys((f"{name}{unit}" for name in ("import", "first", "second") for unit in ("_s", "_cpu_s")), 1.0)
    eager = {**times, "first_weights": "a", "second_weights": "a"}
    series = {
        "eager": Series([eager]),
        "meta": Series(failure="gone"),
        "nucleate": Series([{**eager, "second_weights": "b"}]),
    }
    monkeypatch.setattr("tests.bench.first_use_section.take", lambda *args, **kwargs: series)
    monkeypatch.setattr("tests.bench.first_use_section._measure", lambda *args: {})
    section = first_use("micro", 1)
    assert section.faults == ["first-use meta: gone", "first-use nucleate: the weights are not eager's"]
    assert "| ≤ 1 | 1.38 | **not met** |" in section.text
