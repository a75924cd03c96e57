"""Reads the shards of a checkpoint that are not in memory, one after the other in large blocks: the disk's own rate.

python -m tests.bench.disk --files FOLDER --size 10m --dtype bf16
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench.checkpoint_files import SHAPES, Files, drop, read_all
from tests.bench.measure import report
from tests.bench.model import DTYPES
from tests.bench.state import add_state, enter


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--size", choices=SHAPES, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    add_state(parser)
    args = parser.parse_args(argv)
    files = Files(args.files, args.size, args.dtype)
    drop(files.shards)
    enter(args.state, files.size_bytes, idle_s=args.idle_s)
    start = time.perf_counter()
    num_bytes = read_all(files.shards)
    report({"load_s": time.perf_counter() - start, "num_bytes": num_bytes})


if __name__ == "__main__":
    main()
