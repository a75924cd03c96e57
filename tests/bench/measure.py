"""Takes measurements: each in a fresh process, all of them in turn and then again, so that drift hits all alike.

A measured process prints one line with its numbers (`report`); whatever else it prints is kept for errors.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.multi.ranks import ROOT, run_ranks

_MARK = "MEASURED "

Numbers = dict[str, Any]


class MeasurementError(Exception):
    """A measured process failed; the message is its last words."""


@dataclass
class Series:
    """What the runs of one thing gave.

    Attributes:
        runs: The numbers of each run.
        failure: Why there are none, or too few.
    """

    runs: list[Numbers] = field(default_factory=list)
    failure: str | None = None

    def median(self, key: str) -> float:
        middle: float = statistics.median(self.values(key))
        return middle

    def values(self, key: str) -> list[Any]:
        return [run[key] for run in self.runs]

    def every(self, key: str, expected: object) -> bool:
        """Return whether it was as expected in every single run."""
        return all(value == expected for value in self.values(key))


def report(numbers: Numbers) -> None:
    """Hand numbers to the process that measures."""
    print(_MARK + json.dumps(numbers), flush=True)


def take(
    measurements: Mapping[str, Callable[[], Numbers]], runs: int, once: Sequence[str] = (), what: str = ""
) -> dict[str, Series]:
    """Run measurements A, B, C, then B, C, A, ...: each comes first as often; one that fails is not tried again.

    Args:
        measurements: Name to a function that measures in a fresh process.
        runs: How often each is taken.
        once: Those that are taken once only.
        what: Shown before the name while it runs.
    """
    series = {name: Series() for name in measurements}
    for number in range(1, runs + 1):
        for name in _rotated(list(measurements), number - 1):
            if series[name].failure is not None or (number > 1 and name in once):
                continue
            print(f"{what} run {number} of {runs}: {name}", file=sys.stderr, flush=True)
            try:
                series[name].runs.append(measurements[name]())
            except MeasurementError as error:
                series[name].failure = str(error)
                print(f"  failed: {error}", file=sys.stderr, flush=True)
    return series


def _rotated(names: list[str], count: int) -> list[str]:
    """Begin with another one each time: what comes after a long measurement meets other memory."""
    start = count % len(names) if names else 0
    return names[start:] + names[:start]


def in_process(*arguments: str, threads: int | None = None, timeout_s: float = 900) -> Numbers:
    """Run `python *arguments` and return what it reports.

    Args:
        arguments: Such as `"-m", "tests.bench.train"`.
        threads: torch's threads; None leaves them to torch.
        timeout_s: Seconds after which it is killed.

    Raises:
        MeasurementError: It failed.
    """
    # Users have the byte code of the libraries that they import.
    left_out = ("OMP_NUM_THREADS", "PYTHONDONTWRITEBYTECODE")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=ROOT,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MeasurementError(f"did not end within {timeout_s:.0f} s") from None
    if done.returncode != 0:
        raise MeasurementError(_last_words(done.stderr))
    return _reported(done.stdout)


def on_ranks(module: str, ranks: int, *arguments: str, timeout_s: float = 900) -> Numbers:
    """Run a module on several ranks, one thread each, and return what rank 0 reports.

    Raises:
        MeasurementError: It failed on some rank.
    """
    try:
        return _reported(run_ranks(module, ranks, *arguments, timeout=timeout_s).stdout)
    except AssertionError as error:
        raise MeasurementError(_last_words(str(error))) from None


def _reported(output: str) -> Numbers:
    for line in output.splitlines():
        if line.startswith(_MARK):
            numbers: Numbers = json.loads(line.removeprefix(_MARK))
            return numbers
    raise MeasurementError("it reported nothing")


def _last_words(output: str) -> str:
    """Return the line of a traceback that says what was wrong; the ranks' come before torchrun's own."""
    lines = [line.rpartition("]:")[2].strip() for line in output.splitlines()]
    for start, line in enumerate(lines):
        if line.startswith("Traceback"):
            for last in lines[start + 1 :]:
                name = last.partition(":")[0]
                if name.endswith(("Error", "Exception")) and " " not in name:
                    return last
    return lines[-1] if lines else "no output"
