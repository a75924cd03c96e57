"""Runs the benchmarks and prints their tables.

python -m tests.bench                                  # everything, at full size: about two hours on two cores
python -m tests.bench init --size 1b --runs 5 --write  # one section, into docs/benchmarks.md
python -m tests.bench step imports                     # two of them
python -m tests.bench init --size 1m --runs 1          # a try
python -m tests.bench load --size 10m --runs 1         # another
python -m tests.bench when --runs 2 --write            # with its picture: about 20 minutes
python -m tests.bench quantize --files FOLDER --runs 3 # needs nucleate-bitsandbytes
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.bench.construct import WAYS
from tests.bench.load import WAYS as LOAD_WAYS
from tests.bench.load_section import PARTS, load
from tests.bench.machine import describe
from tests.bench.model import INITS, SIZES
from tests.bench.page import write_section
from tests.bench.quantize_section import quantize
from tests.bench.sections import Section, construct, imports, record, step
from tests.bench.when import SIZES as WHEN_SIZES
from tests.bench.when import STATES
from tests.bench.when_section import THREADS, when

BENCHMARKS = ("init", "record", "load", "quantize", "step", "imports", "when")
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    benchmarks: dict[str, Callable[[], Section]] = {
        "init": lambda: construct(args.size, args.runs, args.inits, args.ways),
        "load": lambda: load(args.size, args.runs, args.parts, args.load_ways, args.files),
        "quantize": lambda: quantize(args.size, args.runs, args.files),
        "record": lambda: record(args.runs),
        "step": lambda: step(args.step_sizes, args.runs, quick=args.quick),
        "imports": lambda: imports(args.runs),
        "when": lambda: when(args.runs, args.sizes, args.states, args.threads),
    }
    faults = []
    for name in args.benchmarks or benchmarks:
        section = benchmarks[name]()
        faults += section.faults
        text = f"{section.text}\n\n{provenance(argv, args.runs)}"
        print(f"## {name}\n\n{text}\n", flush=True)
        if args.write:
            write_section(args.page, name, text)
            if section.draw is not None:
                section.draw(args.page.parent)
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    return 1 if faults else 0


def provenance(argv: Sequence[str], runs: int) -> str:
    """Return where the numbers come from, for under the table."""
    command = shlex.join(["python", "-m", "tests.bench", *argv])
    times = f"Median of {runs} runs, lowest and highest in brackets" if runs > 1 else "One run"
    return f"{times}. {describe()}.\n\n```console\n$ {command}\n```"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("benchmarks", nargs="*", metavar="|".join(BENCHMARKS), help="which to run; all of them by default")
    add("--runs", type=int, default=5, help="fresh processes for each number (default 5)")
    add("--size", choices=SIZES, default="1b", help="the model of init, load and quantize (default 1b)")
    add("--inits", nargs="+", choices=INITS, default=list(INITS), help="how that model is initialized")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways to construct it")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="the tables of load")
    add("--load-ways", nargs="+", choices=LOAD_WAYS, default=list(LOAD_WAYS), help="ways to load")
    add(
        "--files",
        type=Path,
        help="where the checkpoints of load and quantize are made and stay; 13 GB at size 1b",
    )
    add("--step-sizes", nargs="+", choices=SIZES, default=["micro", "1m", "10m"], help="the models of step")
    add("--sizes", nargs="+", choices=WHEN_SIZES, default=list(WHEN_SIZES), help="the models of when")
    add("--states", nargs="+", choices=STATES, default=list(STATES), help="the memory that when finds")
    add("--threads", nargs="+", type=int, default=list(THREADS), help="torch's threads in when")
    add("--quick", action="store_true", help="only few steps: not to be believed")
    add("--write", action="store_true", help="write the tables into the docs")
    add("--page", type=Path, default=PAGE, help="the page that --write changes")
    args = parser.parse_args(argv)
    unknown = [name for name in args.benchmarks if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}: there are {', '.join(BENCHMARKS)}")
    if args.runs < 1:
        parser.error(f"--runs {args.runs} must be at least 1")
    if "eager" not in args.ways:
        args.ways = ["eager", *args.ways]
    return args


if __name__ == "__main__":
    sys.exit(main())
