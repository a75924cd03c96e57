"""Runs the benchmarks and prints their tables.

python -m tests.bench                                  # all but large, at full size: 1.5 hours on two cores
python -m tests.bench init --size 1b --runs 5 --write  # one section, into docs/benchmarks.md
python -m tests.bench step imports                     # two of them
python -m tests.bench launch --runs 5                  # two ranks, beside Fabric
python -m tests.bench small --files FOLDER             # torch files of 3 to 90 MB
python -m tests.bench init --size 1m --runs 1          # a try
python -m tests.bench load --size 10m --runs 1         # another
python -m tests.bench when --runs 2 --write            # with its picture: about 20 minutes
python -m tests.bench quantize --files FOLDER --runs 3 # needs nucleate-bitsandbytes
python -m tests.bench large --size 7b --files FOLDER   # 13 GB of disk, 16 GiB of memory; needs it as well
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.bench.checkpoint_files import SHAPES
from tests.bench.construct_ways import WAYS
from tests.bench.first_use_section import first_use
from tests.bench.init_section import construct
from tests.bench.large import WAYS as LARGE_WAYS
from tests.bench.large_section import IDLE_S as LARGE_IDLE_S
from tests.bench.large_section import large
from tests.bench.launch import launch
from tests.bench.load_section import PARTS, load
from tests.bench.load_ways import WAYS as LOAD_WAYS
from tests.bench.machine import describe
from tests.bench.model import DTYPES, INITS, SIZES
from tests.bench.page import write_section
from tests.bench.quantize_section import quantize
from tests.bench.section import Section
from tests.bench.sections import imports, record, step
from tests.bench.small_files import small_files
from tests.bench.state import IDLE_S, STATES, UNTOUCHED
from tests.bench.when import SIZES as WHEN_SIZES
from tests.bench.when_section import THREADS, when

BENCHMARKS = ("init", "first-use", "record", "load", "small", "quantize", "large", "step", "imports", "launch", "when")
#: The numbers of these depend on the state of memory.
_BY_STATE = ("init", "load", "quantize", "large", "when")
#: What is run when nothing is named.
_DEFAULT = tuple(name for name in BENCHMARKS if name != "large")
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    size, states = args.size or "1b", args.states or STATES
    idle_s = IDLE_S if args.idle_s is None else args.idle_s
    benchmarks: dict[str, Callable[[], Section]] = {
        "init": lambda: construct(size, args.runs, args.inits, args.ways, args.dtypes, states, idle_s),
        "first-use": lambda: first_use(size, args.runs),
        "load": lambda: load(size, args.runs, args.parts, args.load_ways, args.files, states, idle_s),
        "small": lambda: small_files(args.runs, args.files),
        "quantize": lambda: quantize(size, args.runs, args.files, states, idle_s),
        "large": lambda: large(
            args.size or "7b",
            args.runs,
            args.large_ways,
            args.files,
            args.states or [UNTOUCHED],
            LARGE_IDLE_S if args.idle_s is None else args.idle_s,
        ),
        "record": lambda: record(args.runs),
        "step": lambda: step(args.step_sizes, args.runs, quick=args.quick),
        "imports": lambda: imports(args.runs),
        "launch": lambda: launch(args.runs),
        "when": lambda: when(args.runs, args.sizes, states, args.threads, idle_s),
    }
    faults = []
    for name in args.benchmarks or _DEFAULT:
        section = benchmarks[name]()
        faults += section.faults
        text = f"{section.text}\n\n{provenance(argv, args.runs, name in _BY_STATE)}"
        print(f"## {name}\n\n{text}\n", flush=True)
        if args.write:
            write_section(args.page, name, text)
            if section.draw is not None:
                section.draw(args.page.parent)
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    return 1 if faults else 0


def provenance(argv: Sequence[str], runs: int, pages: bool) -> str:
    """Return where the numbers come from, for under the table; with the cost of pages where they depend on it."""
    command = shlex.join(["python", "-m", "tests.bench", *argv])
    times = f"Median of {runs} runs, lowest and highest in brackets" if runs > 1 else "One run"
    return f"{times}. {describe(pages)}.\n\n```console\n$ {command}\n```"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("benchmarks", nargs="*", metavar="|".join(BENCHMARKS), help="which to run; all but large by default")
    add("--runs", type=int, default=5, help="fresh processes for each number (default 5)")
    add(
        "--size",
        choices=SHAPES,
        help="the model; by default 1b, of large 7b",
    )
    add("--inits", nargs="+", choices=INITS, default=list(INITS), help="how that model is initialized")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="in which dtypes")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways to construct it")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="the tables of load")
    add("--load-ways", nargs="+", choices=LOAD_WAYS, default=list(LOAD_WAYS), help="ways to load")
    add("--large-ways", nargs="+", choices=LARGE_WAYS, default=list(LARGE_WAYS), help="ways of large")
    add(
        "--states",
        nargs="+",
        choices=STATES,
        help="the states of memory in which a measurement starts (default both; for large, untouched)",
    )
    rest = f"seconds of rest that make memory untouched (default {IDLE_S}, for large {LARGE_IDLE_S})"
    add("--idle-s", type=float, help=rest)
    add(
        "--files",
        type=Path,
        help="where the checkpoints of load, quantize and large are made and stay: 13 GB at size 1b, as much at 7b",
    )
    add("--step-sizes", nargs="+", choices=SIZES, default=["micro", "1m", "10m"], help="the models of step")
    add("--sizes", nargs="+", choices=WHEN_SIZES, default=list(WHEN_SIZES), help="the models of when")
    add("--threads", nargs="+", type=int, default=list(THREADS), help="torch's threads in when")
    add("--quick", action="store_true", help="only few steps: not to be believed")
    add("--write", action="store_true", help="write the tables into the docs")
    add("--page", type=Path, default=PAGE, help="the page that --write changes")
    args = parser.parse_args(argv)
    unknown = [name for name in args.benchmarks if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}: there are {', '.join(BENCHMARKS)}")
    small = set(args.benchmarks or _DEFAULT) & {"init", "load", "quantize"}
    if small and args.size is not None and args.size not in SIZES:
        parser.error(f"--size {args.size} is for large only; {min(small)} takes {', '.join(SIZES)}")
    if args.runs < 1:
        parser.error(f"--runs {args.runs} must be at least 1")
    if "eager" not in args.ways:
        args.ways = ["eager", *args.ways]
    return args


if __name__ == "__main__":
    sys.exit(main())
