"""The parts in which `run_all.py` runs the tests, in the order of their worth, each in a process of its own.

A process of its own, because a fault on a GPU makes everything fail that follows in the same process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu import reporting
from tests.gpu.reporting import ROOT

BITSANDBYTES = "plugins/nucleate-bitsandbytes"


@dataclass(frozen=True)
class Part:
    """Some of the tests.

    Attributes:
        name: What `--parts` calls it.
        paths: What pytest is given, relative to `folder`.
        limit_s: Seconds after which it is ended.
        keyword: pytest's `-k`.
        alone: Whether nothing else may run meanwhile, because it measures time or needs the device's memory.
        folder: Where pytest starts.
        on_simulated: Whether it can run on the simulated device.
    """

    name: str
    paths: tuple[str, ...]
    limit_s: float
    keyword: str = ""
    alone: bool = False
    folder: str = "."
    on_simulated: bool = True


PARTS = (
    Part("values", ("tests/gpu/test_exactness.py",), 120),
    Part("ranks", ("tests/gpu/test_ranks.py",), 150, keyword="holds_on_two_devices"),
    Part("loading", ("tests/gpu/test_loading.py",), 90),
    Part("sizes", ("tests/gpu/test_real_sizes.py",), 120, alone=True),
    Part("overlap", ("tests/gpu/test_overlap.py",), 60, alone=True),
    Part("precision", ("tests/gpu/test_precision.py",), 60),
    Part("devices", ("tests/gpu/test_devices.py",), 60),
    Part("faults", ("tests/gpu/test_ranks.py",), 100, keyword="raises"),
    Part("bitsandbytes", ("tests/test_cuda.py",), 90, folder=BITSANDBYTES, on_simulated=False),
    Part("accelerators", ("tests/accelerators",), 60, on_simulated=False),
    Part("suites", ("tests/gpu/test_conformance.py",), 120),
    Part("suites-ranks", ("tests/gpu/test_ranks.py",), 150, keyword="passes_its_suite"),
    Part("stand-in", ("tests/gpu/test_stand_in.py",), 60),
)


@dataclass
class Result:
    """What became of a part.

    Attributes:
        part: The part.
        seconds: How long it took.
        tests: For each test its `outcome` (`passed`, `failed`, or `not run`), `reason`, `seconds` and what it measured.
        fault: Why the part as a whole failed, if it did; else an empty text.
    """

    part: Part
    seconds: float = 0.0
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    fault: str = ""

    def count(self, outcome: str) -> int:
        """Return how many tests had an outcome."""
        return sum(test["outcome"] == outcome for test in self.tests.values())

    @property
    def failed(self) -> bool:
        """Whether a test failed, or the part did."""
        return bool(self.fault) or self.count("failed") > 0


class Running:
    """A part whose process has been started.

    Args:
        part: The part.
        device_type: What its tests run on.
        folder: Where it writes.
        limit_s: Seconds after which it is ended.
        select: pytest's `-k`, beside the part's own.
    """

    def __init__(self, part: Part, device_type: str, folder: Path, limit_s: float, select: str = "") -> None:
        self.part = part
        self._report = folder / f"{part.name}.jsonl"
        self._log = folder / f"{part.name}.log"
        self._started = time.monotonic()
        self._limit_s = limit_s
        keyword = " and ".join(f"({text})" for text in (part.keyword, select) if text)
        command = [sys.executable, "-m", "pytest", *part.paths, "-q", "-p", "tests.gpu.reporting"]
        command += ["-p", "no:cacheprovider", *(("-k", keyword) if keyword else ())]
        if device_type == "cuda":
            command += ["-m", "cuda"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT / part.folder,
                env=variables(device_type) | {reporting.VARIABLE: str(self._report)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def result(self) -> Result | None:
        """Return what became of it, or None while it runs."""
        code = self._process.poll()
        seconds = time.monotonic() - self._started
        if code is None and seconds <= self._limit_s:
            return None
        was_ended = code is None
        if was_ended:
            code = self.end()
        result = Result(self.part, time.monotonic() - self._started)
        for line in reporting.read(self._report):
            if "collected" in line:
                result.tests[line["collected"]] = _not_run("the part ended before it")
            else:
                skipped = line["outcome"] == "skipped"
                result.tests[line["test"]] = line | {"outcome": "not run" if skipped else line["outcome"]}
        if was_ended:
            result.fault = f"it was ended after {self._limit_s:.0f} s"
        # 5: nothing was selected.
        elif code not in (0, 1, 5) or (code == 1 and not result.count("failed")):
            result.fault = f"pytest exited with {code}: {self._log.read_text(errors='replace')[-4000:]}"
        return result

    def end(self) -> int:
        """End the process and what it has started, as an interrupt by the user would."""
        self._process.send_signal(signal.SIGINT)
        try:
            # pytest then ends torchrun, which gives its ranks 30 s.
            return self._process.wait(timeout=50)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            return self._process.wait()


def variables(device_type: str) -> dict[str, str]:
    """Return the environment of a part: the repository first, and arithmetic that can be compared."""
    paths = [str(ROOT), str(ROOT / "src"), str(ROOT / BITSANDBYTES / "src"), os.environ.get("PYTHONPATH", "")]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    if device_type == "cuda":
        # Ways e and f, and reading large files, use more.
        found["OMP_NUM_THREADS"] = str(max(1, min(8, (os.cpu_count() or 1) // 4)))
    return found | {"NUCLEATE_TEST_DEVICE": device_type, "NVIDIA_TF32_OVERRIDE": "0"}


def facts(device_type: str) -> dict[str, Any]:
    """Return what a run depends on. Another process asks, so that no memory of a GPU is taken here."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.device_facts"],
        env=variables(device_type),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"The device cannot be asked:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def not_started(part: Part, reason: str) -> Result:
    """Return the result of a part that was never started."""
    return Result(part, tests={f"{path} ({part.name})": _not_run(reason) for path in part.paths})


def _not_run(reason: str) -> dict[str, Any]:
    return {"outcome": "not run", "reason": reason, "seconds": 0.0, "measured": {}}
