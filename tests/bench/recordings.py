"""Asks for the record of a deferred tensor while few and while many recordings are alive, and reports both times.

    python -m tests.bench.recordings

A tensor that is being constructed, and one that is real, are looked for by the address of their storage.
"""

from __future__ import annotations

import argparse
import statistics
import timeit
from collections.abc import Sequence

import torch
from torch import Tensor

from nucleate.deferred import deferred, record_of
from tests.bench.measure import report

_CALLS = 2_000


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recordings", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(argv)
    one = _questions(options.rounds)
    kept: list[Tensor] = []
    for _ in range(options.recordings):
        with deferred():
            kept.append(torch.ones(2))
    many = _questions(options.rounds)
    report(
        {f"{kind}_one_s": seconds for kind, seconds in one.items()}
        | {f"{kind}_many_s": seconds for kind, seconds in many.items()}
        | {"recordings": len({id(record_of(tensor)) for tensor in kept})}
    )


def _questions(rounds: int) -> dict[str, float]:
    """Return how long a question takes, in seconds: of a tensor that is being recorded, and of a real one."""
    real = torch.ones(2)
    with deferred():
        recorded = torch.ones(2)
        assert record_of(recorded) is not None
        assert record_of(real) is None
        return {kind: _question_s(tensor, rounds) for kind, tensor in (("recorded", recorded), ("real", real))}


def _question_s(tensor: Tensor, rounds: int) -> float:
    return statistics.median(timeit.repeat(lambda: record_of(tensor), number=_CALLS, repeat=rounds)) / _CALLS


if __name__ == "__main__":
    main()
