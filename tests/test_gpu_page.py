"""The page that lists what has run on a GPU says what the tests and the reported results say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import page
from tests.gpu.page import Row

FILE = "tests/gpu/test_a.py"
ROWS = [Row(f"{FILE}::test_x", "It shows x.", {f"{FILE}::test_x[1]", f"{FILE}::test_x[2]"})]


def run_with(*passed: str) -> dict[str, Any]:
    facts = {"date": "2030-01-02", "gpu": "A GPU", "devices": 2, "torch": "2.13.0", "cuda": "13.0", "nucleate": "0.1.0"}
    return {**facts, "passed": list(passed)}


def sections(text: str) -> dict[str, str]:
    return dict(part.split("\n", 1) for part in text.split("\n## "))


def test_the_page_lists_every_test_that_is_marked_cuda() -> None:
    pytest.importorskip("nucleate_bitsandbytes")
    rows = page.collect()
    assert {"plugins/nucleate-bitsandbytes/tests/test_cuda.py", "tests/accelerators/test_cuda.py"} <= {
        row.name.partition("::")[0] for row in rows
    }
    assert page.PAGE.read_text(encoding="utf-8") == page.text_of(rows, page.read_results()), (
        "docs/reference/gpu.md is not what the tests say. Write it anew: python -m tests.gpu.page --write"
    )


def test_a_test_has_passed_when_all_of_its_cases_have() -> None:
    never, have = "Tests that have never passed on a GPU", "Tests that have passed on a GPU"
    found = sections(page.text_of(ROWS, []))
    assert "| `test_x` | 2 | It shows x. |" in found[never]
    assert found[have].strip() == found["Reported runs"].strip() == "None."
    found = sections(page.text_of(ROWS, [run_with(f"{FILE}::test_x[1]")]))
    assert "| `test_x` | 1 of 2 passed | It shows x. |" in found[never]
    assert found[have].strip() == "None."
    found = sections(page.text_of(ROWS, [run_with(f"{FILE}::test_x[1]"), run_with(f"{FILE}::test_x[2]")]))
    assert found[never].strip() == "None."
    assert "test_x" in found[have]
    assert "- 2030-01-02: 2 x A GPU, torch 2.13.0, CUDA 13.0, nucleate 0.1.0: 1 cases passed" in found["Reported runs"]


def test_results_of_a_gpu_are_entered_and_others_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results.json")
    (tmp_path / "results.json").write_text('{"runs": []}')
    tests = {"a": {"outcome": "passed"}, "b": {"outcome": "failed"}, "c": {"outcome": "not run"}}
    results = {**run_with(), "device": "cuda", "tests": tests}
    page.add(results)
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert run == run_with("a")
    with pytest.raises(SystemExit, match="device 'sim'"):
        page.add(results | {"device": "sim"})
    assert len(page.read_results()) == 1
