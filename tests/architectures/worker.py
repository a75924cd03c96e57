"""A worker process: reads names of cases, writes a verdict for each as one line of JSON."""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import warnings

from tests.architectures.families import family
from tests.architectures.verdict import judge

#: A model that was not made small enough must not take the machine down.
MEMORY_LIMIT_BYTES = 10 << 30


def main() -> None:
    # What models print must not get between the verdicts.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    cases = family(sys.argv[1])
    for line in sys.stdin:
        verdict = judge(cases, line.strip())
        answers.write(json.dumps(verdict.as_dict(), default=str) + "\n")
        answers.flush()
        gc.collect()


if __name__ == "__main__":
    main()
