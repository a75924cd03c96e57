"""Runs every test that needs a GPU, on one GPU and on two, in under five minutes, and says what did not run.

    python tests/gpu/run_all.py --out results.json           # on the GPUs of this machine
    python tests/gpu/run_all.py --table --out results.json   # and the table of a 7B LLaMA, in ten minutes more
    python tests/gpu/run_all.py --parts values loading       # some parts
    python tests/gpu/run_all.py --device sim --parts loading # the same code on the simulated device

Nothing is downloaded: all weights are random. The exit status is 0 if nothing failed. `python -m tests.gpu.page --add
results.json --write` enters the results into the page of the docs that lists what has run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])

from tests.gpu.llama_table import measure
from tests.gpu.parts import PARTS, Part, Result, Running, facts, not_started


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    started = time.monotonic()
    found = facts(args.device)
    words = describe(found)
    print(words, flush=True)
    if not found["devices"]:
        print(f"torch sees no device of type {args.device!r}: nothing can run.", file=sys.stderr)
        return 1
    chosen = [part for part in PARTS if part.name in args.parts]
    with TemporaryDirectory(prefix="nucleate-gpu-") as folder:
        results = run(chosen, args, Path(folder), started)
    seconds = time.monotonic() - started
    table = measure(args.device, found, args.table_budget) if args.table else None
    print(summary(words, results, seconds))
    if table is not None:
        print(f"\n{table['text']}")
    if args.out:
        args.out.write_text(json.dumps(as_json(found, results, seconds, table), indent=1), encoding="utf-8")
        print(f"Wrote {args.out}.")
    has_failed = any(result.failed for result in results) or (table is not None and bool(table["fault"]))
    return 1 if has_failed or not any(result.count("passed") for result in results) else 0


def run(parts: Sequence[Part], args: argparse.Namespace, folder: Path, started: float) -> list[Result]:
    """Run the parts, some of them at a time, until the budget is spent; print each as it ends."""
    waiting, running, results = list(parts), list[Running](), list[Result]()
    try:
        while waiting or running:
            left_s = args.budget - (time.monotonic() - started)
            while waiting and left_s > 0 and len(running) < args.jobs:
                part = next_part(waiting, running)
                if part is None:
                    break
                waiting.remove(part)
                if args.device != "cuda" and not part.on_simulated:
                    finish(results, not_started(part, "there are no CUDA kernels on the simulated device"))
                    continue
                limit_s = min(part.limit_s * args.patience, left_s)
                running.append(Running(part, args.device, folder, limit_s, args.select))
            if waiting and left_s <= 0:
                for part in waiting:
                    finish(results, not_started(part, f"the budget of {args.budget:.0f} s was spent"))
                waiting.clear()
            for each in list(running):
                result = each.result()
                if result is not None:
                    running.remove(each)
                    finish(results, result)
            time.sleep(0.05)
    finally:
        for each in running:
            each.end()
    return results


def next_part(waiting: Sequence[Part], running: Sequence[Running]) -> Part | None:
    """Return the part to start now: the first that may run beside what runs, or None."""
    if any(each.part.alone for each in running):
        return None
    return next((part for part in waiting if not (part.alone and running)), None)


def finish(results: list[Result], result: Result) -> None:
    results.append(result)
    counts = ", ".join(f"{result.count(outcome)} {outcome}" for outcome in ("passed", "failed", "not run"))
    print(
        f"{result.part.name}: {counts} in {result.seconds:.0f} s{'; ' + result.fault if result.fault else ''}",
        flush=True,
    )


# -- what is said --------------------------------------------------------------------------------------------


def describe(found: dict[str, Any]) -> str:
    """Return in a line what a run depends on."""
    names = Counter(found["gpus"])
    devices = ", ".join(f"{number} x {name}" for name, number in names.items())
    devices = devices or f"{found['devices']} devices of type {found['device']}"
    cuda = f"CUDA {found['cuda']}, NCCL {found['nccl']}" if found["cuda"] else "no CUDA"
    machine = f"nucleate {found['nucleate']}, {found['cores']} cores, {found['date']}"
    return f"{devices}; torch {found['torch']}, {cuda}, {machine}"


def summary(words: str, results: Sequence[Result], seconds: float) -> str:
    """Return the table, the failures, and why tests did not run."""
    width = max((len(result.part.name) for result in results), default=5) + 2
    lines = ["", words, "", f"{'part':<{width}} passed  failed  not run  seconds"]
    outcomes = ("passed", "failed", "not run")
    for result in results:
        passed, failed, left = (result.count(outcome) for outcome in outcomes)
        lines.append(f"{result.part.name:<{width}} {passed:>6}  {failed:>6}  {left:>7}  {result.seconds:>7.0f}")
    passed, failed, left = (sum(result.count(outcome) for result in results) for outcome in outcomes)
    lines.append(f"{'in all':<{width}} {passed:>6}  {failed:>6}  {left:>7}  {seconds:>7.0f}")
    for result in results:
        lines += [f"\nFAILED {result.part.name}: {result.fault}"] if result.fault else []
        for name, test in result.tests.items():
            if test["outcome"] == "failed":
                lines.append(f"\nFAILED {name}\n{test['reason']}")
    reasons = Counter(
        test["reason"] for result in results for test in result.tests.values() if test["outcome"] == "not run"
    )
    lines += (
        ["", "Not run:", *(f"  {number:>4}  {reason}" for reason, number in reasons.most_common())] if reasons else []
    )
    measured = [
        f"  {name}: {', '.join(f'{key} {value}' for key, value in test['measured'].items())}"
        for result in results
        for name, test in result.tests.items()
        if test["measured"]
    ]
    lines += ["", "Measured:", *measured] if measured else []
    return "\n".join(lines)


def as_json(
    found: dict[str, Any], results: Sequence[Result], seconds: float, table: dict[str, Any] | None
) -> dict[str, Any]:
    """Return everything that `--out` writes."""
    tests = {
        name: {key: test[key] for key in ("outcome", "reason", "seconds", "measured")}
        for result in results
        for name, test in result.tests.items()
    }
    parts = {result.part.name: {"seconds": round(result.seconds, 1), "fault": result.fault} for result in results}
    return {**found, "seconds": round(seconds, 1), "parts": parts, "tests": tests, "table": table}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cuda", "sim"), default="cuda", help="what the tests run on (default cuda)")
    add("--parts", nargs="+", choices=names, default=names, metavar="PART", help=f"some of {', '.join(names)}")
    add("--select", default="", help="pytest's -k, for all parts")
    add("--budget", type=float, default=300, help="seconds for all parts together (default 300)")
    add("--patience", type=float, default=1, help="a factor for the time limit of each part")
    add("--jobs", type=int, help="how many parts run at a time (default 3 where there are 8 cores, else 1)")
    add("--out", type=Path, help="the file of results to write")
    add("--table", action="store_true", help="also load a LLaMA of 7B in six ways, and show time and memory")
    add("--table-budget", type=float, default=600, help="seconds for the table (default 600)")
    args = parser.parse_args(argv)
    if args.jobs is None:
        args.jobs = 3 if args.device == "cuda" and (os.cpu_count() or 1) >= 8 else 1
    if args.jobs < 1 or args.budget <= 0 or args.patience <= 0:
        parser.error("--jobs must be at least 1, --budget and --patience more than 0")
    return args


if __name__ == "__main__":
    sys.exit(main())
