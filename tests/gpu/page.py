"""Writes the page of the docs that lists which tests have run on a GPU, from the tests and from a file of results.

python -m tests.gpu.page --write                    # write the page anew
python -m tests.gpu.page --add results.json --write # after `tests/gpu/run_all.py --out results.json` on a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.gpu import reporting
from tests.gpu.parts import BITSANDBYTES, variables
from tests.gpu.reporting import ROOT

PAGE = ROOT / "docs" / "reference" / "gpu.md"
RESULTS = ROOT / "tests" / "gpu" / "results.json"

_INTRODUCTION = """# What has run on a GPU

nucleate is developed on machines without a GPU. There, a simulated device runs the same code. It has two indices,
generators of its own, pinned memory, and copies that run late. Some behavior only a GPU can show: the numbers of its
random generator, NCCL, the overlap of copies with work, models of real size, and CUDA kernels. The tests for these are
marked `cuda`.

This page is generated from those tests and from the results that have been reported. A test of the project compares
it with both, so that it cannot go out of date.
"""

_HOW = """## Run the tests on your GPU

From a clone of the repository, with a torch that supports your GPU. No network is needed once the packages are
installed, because all weights are random:

```console
$ pip install -e '.[examples]' -e ./plugins/nucleate-bitsandbytes pytest pytest-timeout numpy transformers
$ python tests/gpu/run_all.py --out results.json
```

The script takes less than five minutes. It prints which tests passed, failed and did not run, and why. With two GPUs it
also runs the tests that need two. `--table` adds a table of six ways to load a LLaMA of 7 billion parameters, in at
most ten more minutes. `python -m nox -s gpu` does the same in an environment of its own.

To report results, attach `results.json` to an issue, or enter them and send a change of both files:

```console
$ python -m tests.gpu.page --add results.json --write
```
"""


@dataclass
class Row:
    """A test function, or a class of tests, with all its cases.

    Attributes:
        name: The file, `::` and the name.
        purpose: One line.
        cases: The names of all cases.
    """

    name: str
    purpose: str
    cases: set[str] = field(default_factory=set)


def collect() -> list[Row]:
    """Return all tests that are marked `cuda`, those of the plugins included.

    Raises:
        AssertionError: pytest cannot collect them.
    """
    rows: dict[str, Row] = {}
    for folder, paths in ((".", files_with_mark("tests")), (BITSANDBYTES, ["tests"])):
        with TemporaryDirectory() as name:
            report = Path(name) / "report.jsonl"
            command = [sys.executable, "-m", "pytest", *paths, "-m", "cuda", "--collect-only", "-q"]
            command += ["-p", "tests.gpu.reporting", "-p", "no:cacheprovider"]
            env = variables("cuda") | {reporting.VARIABLE: str(report)}
            # A pytest that runs this one must not be taken for its launcher.
            env = {key: value for key, value in env.items() if not key.startswith("PYTEST_")}
            done = subprocess.run(command, cwd=ROOT / folder, env=env, capture_output=True, text=True)
            assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
            for line in reporting.read(report):
                row = rows.setdefault(line["row"], Row(line["row"], line["purpose"]))
                row.cases.add(line["collected"])
    return [rows[name] for name in sorted(rows)]


def files_with_mark(folder: str) -> list[str]:
    """Return the test files of a folder that say `mark.cuda`; importing all the others takes long."""
    paths = sorted((ROOT / folder).rglob("test_*.py"))
    return [path.relative_to(ROOT).as_posix() for path in paths if "mark.cuda" in path.read_text(encoding="utf-8")]


def read_results() -> list[dict[str, Any]]:
    """Return the runs on GPUs that have been reported."""
    runs: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
    return runs


def text_of(rows: Sequence[Row], runs: Sequence[dict[str, Any]]) -> str:
    """Return the page.

    Args:
        rows: All tests.
        runs: The runs that have been reported, each with what it ran on and the cases that passed.
    """
    passed = {name for run in runs for name in run["passed"]}
    never = [row for row in rows if not row.cases <= passed]
    have = [row for row in rows if row.cases <= passed]
    parts = [_INTRODUCTION, _HOW]
    parts.append(f"## Tests that have never passed on a GPU\n\n{_table(never, passed) if never else 'None.'}\n")
    parts.append(f"## Tests that have passed on a GPU\n\n{_table(have, passed) if have else 'None.'}\n")
    if runs:
        lines = [
            f"- {run['date']}: {run['devices']} x {run['gpu']}, torch {run['torch']}, CUDA {run['cuda']}, nucleate "
            f"{run['nucleate']}: {len(run['passed'])} cases passed"
            for run in runs
        ]
        parts.append("## Reported runs\n\n" + "\n".join(lines) + "\n")
    else:
        parts.append("## Reported runs\n\nNone.\n")
    return "\n".join(parts)


def _table(rows: Sequence[Row], passed: set[str]) -> str:
    """Return tables, one for each file."""
    files: dict[str, list[Row]] = {}
    for row in rows:
        files.setdefault(row.name.partition("::")[0], []).append(row)
    texts = []
    for path, its_rows in files.items():
        lines = [f"### `{path}`", "", "| test | cases | what it shows |", "| --- | ---: | --- |"]
        for row in its_rows:
            number = len(row.cases & passed)
            cases = (
                f"{number} of {len(row.cases)} passed" if number and number < len(row.cases) else str(len(row.cases))
            )
            purpose = row.purpose.replace("|", "\\|")
            lines.append(f"| `{row.name.partition('::')[2]}` | {cases} | {purpose} |")
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def add(results: dict[str, Any]) -> None:
    """Enter a run into the file of results.

    Raises:
        SystemExit: It did not run on a GPU.
    """
    if results["device"] != "cuda" or not results["gpu"]:
        raise SystemExit(f"These results are of device {results['device']!r}. Only runs on a GPU are entered.")
    run = {key: results[key] for key in ("date", "gpu", "devices", "torch", "cuda", "nucleate")}
    run["passed"] = sorted(name for name, test in results["tests"].items() if test["outcome"] == "passed")
    runs = [*read_results(), run]
    RESULTS.write_text(f"{json.dumps({'runs': runs}, indent=1)}\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, help="a file of results to enter")
    parser.add_argument("--write", action="store_true", help="write the page; else it is printed")
    args = parser.parse_args(argv)
    if args.add:
        add(json.loads(args.add.read_text(encoding="utf-8")))
    text = text_of(collect(), read_results())
    if args.write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
