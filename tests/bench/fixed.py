"""Constructs a tiny model without values, twice, in a process in which only torch is imported, and reports the times.

    python -m tests.bench.fixed nucleate

The first time holds everything that is paid once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from tests.bench.measure import report
from tests.bench.model import SIZES, Decoder

Context = Callable[[], AbstractContextManager[object]]


def _nucleate() -> Context:
    from nucleate.deferred import deferred

    return deferred


def _accelerate() -> Context:
    from accelerate import init_empty_weights

    context: Context = init_empty_weights
    return context


WAYS: dict[str, Callable[[], Context]] = {
    "nucleate": _nucleate,
    "meta": lambda: lambda: torch.device("meta"),
    "accelerate": _accelerate,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    way = WAYS[parser.parse_args(argv).way]
    start = time.perf_counter()
    context = way()
    times = [time.perf_counter() - start]
    for _ in range(2):
        start = time.perf_counter()
        with context():
            Decoder(SIZES["micro"])
        times.append(time.perf_counter() - start)
    report(dict(zip(("import_s", "first_s", "again_s"), times, strict=True)))


if __name__ == "__main__":
    main()
