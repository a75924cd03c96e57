"""A worker process: reads names of cases, writes a verdict for each as one line of JSON."""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import warnings

from tests.architectures.families import family, limits
from tests.architectures.verdict import judge
from tests.device import ACCELERATOR


def main() -> None:
    # What models print must not get between the verdicts.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    if ACCELERATOR == "sim":
        from tests.sim.device import install

        install().set_late(True)
    limit_bytes = limits(sys.argv[1]).memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    cases = family(sys.argv[1])
    for line in sys.stdin:
        verdict = judge(cases, line.strip())
        answers.write(json.dumps(verdict.as_dict(), default=str) + "\n")
        answers.flush()
        gc.collect()


if __name__ == "__main__":
    main()
