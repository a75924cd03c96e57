"""A pytest plugin that writes which tests were collected and how each ended, as lines of JSON.

`run_all.py` and `page.py` load it with `-p tests.gpu.reporting`, and name the file in `NUCLEATE_TEST_REPORT`. A line is
written at once, so that the report of a process that is killed is whole up to then.
"""

from __future__ import annotations

import inspect
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
VARIABLE = "NUCLEATE_TEST_REPORT"

# How pytest names a test, which depends on the folder it was started in, to how the repository does.
_names: dict[str, str] = {}
_began: dict[str, float] = {}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Write every test that is going to run."""
    for item in session.items:
        path = (item.path.relative_to(ROOT) if item.path.is_relative_to(ROOT) else item.path).as_posix()
        _names[item.nodeid] = f"{path}::{item.nodeid.partition('::')[2]}"
        holder = item.cls if isinstance(item, pytest.Function) else None
        function = getattr(item, "function", None)
        row = f"{path}::{holder.__name__ if holder else getattr(item, 'originalname', item.name)}"
        _write({"collected": _names[item.nodeid], "row": row, "purpose": _purpose(holder or function, row)})


def pytest_runtest_logstart(nodeid: str) -> None:
    """Note when a test begins."""
    _began[nodeid] = time.monotonic()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write how a test ended, once it has: after its call, or earlier where it is skipped or fails."""
    if report.when == "call" or not report.passed:
        _write(
            {
                "test": _names.get(report.nodeid, report.nodeid),
                "outcome": report.outcome,
                "seconds": round(time.monotonic() - _began.get(report.nodeid, time.monotonic()), 2),
                "reason": _reason(report),
                "measured": dict(report.user_properties),
            }
        )


def _purpose(holder: Any, row: str) -> str:
    """Return the first line of a test's own docstring, or its name as a sentence."""
    # A class would inherit the docstring of its suite.
    own = vars(holder).get("__doc__") if inspect.isclass(holder) else getattr(holder, "__doc__", None)
    if own:
        return str(own).strip().splitlines()[0]
    words = row.rpartition("::")[2].removeprefix("test_").replace("_", " ")
    return f"{words[:1].upper()}{words[1:]}."


def _reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return f"a known fault: {report.wasxfail}"
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return report.longreprtext[-6000:] if report.failed else ""


def _write(values: dict[str, Any]) -> None:
    if VARIABLE in os.environ:
        with open(os.environ[VARIABLE], "a", encoding="utf-8") as file:
            file.write(f"{json.dumps(values)}\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines that a process wrote; the last one may be cut off where it was killed."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found
