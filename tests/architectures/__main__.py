"""Judges every architecture of some families: `python -m tests.architectures [FAMILY...]`.

Prints what is not exact and the totals, and writes everything to a JSON file. Ends with 1 if anything is not exact.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.architectures.families import FAMILIES, family
from tests.architectures.pool import judge_all
from tests.architectures.verdict import DIFFERENT, EXACT, HEAP, UNBUILDABLE

GOOD = (EXACT, HEAP, UNBUILDABLE)


def main() -> int:
    options = _options()
    everything: dict[str, list[dict[str, Any]]] = {}
    for name in options.families or list(FAMILIES):
        names = [case for case in family(name).names() if options.k is None or options.k in case]
        if options.exactly:
            names = [case for case in names if case in set(options.exactly.read_text().split())]
        names = names[options.first :: options.every]
        started = time.perf_counter()
        verdicts = everything[name] = []
        for verdict in judge_all(name, names, options.jobs):
            verdicts.append(verdict)
            _print_verdict(verdict, len(verdicts), len(names), options.verbose)
            options.json.parent.mkdir(parents=True, exist_ok=True)
            if len(verdicts) % 50 == 0 or len(verdicts) == len(names):
                options.json.write_text(json.dumps(everything, indent=1))
        _print_totals(name, verdicts, time.perf_counter() - started)
    return int(any(verdict["outcome"] not in GOOD for verdicts in everything.values() for verdict in verdicts))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; by default all")
    parser.add_argument("-k", metavar="NAME", help="only cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, default=Path("build/architectures.json"), help="where the verdicts go")
    parser.add_argument("--exactly", type=Path, help="only the cases named in this file")
    parser.add_argument("--every", type=int, default=1, help="only every n-th case")
    parser.add_argument("--first", type=int, default=0, help="begin with this one")
    parser.add_argument("-v", "--verbose", action="store_true", help="print exact ones too")
    options = parser.parse_args()
    unknown = set(options.families) - set(FAMILIES)
    if unknown:
        parser.error(f"no family {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    return options


def _print_verdict(verdict: dict[str, Any], index: int, total: int, verbose: bool) -> None:
    if verdict["outcome"] == EXACT and not verbose:
        return
    print(f"[{index}/{total}] {verdict['name']}: {verdict['outcome']}", flush=True)
    for line in verdict["details"][:6]:
        print(f"    {line[:600]}", flush=True)


def _print_totals(name: str, verdicts: list[dict[str, Any]], elapsed_s: float) -> None:
    outcomes = Counter(verdict["outcome"] for verdict in verdicts)
    built = len(verdicts) - outcomes[UNBUILDABLE]
    early = [verdict for verdict in verdicts if verdict["early"]]
    parameters = [verdict for verdict in verdicts if any(is_parameter for *_, is_parameter in verdict["early"])]
    print(
        f"{name}: {len(verdicts)} cases in {elapsed_s:.0f} s; built {built}, exact {outcomes[EXACT]}, "
        f"equal where eager construction writes {outcomes[HEAP]}, different {outcomes[DIFFERENT]}, "
        f"crashed {outcomes['crashed']}, not buildable eagerly {outcomes[UNBUILDABLE]}; "
        f"values made early in {len(early)}, parameters in {len(parameters)}"
    )
    reasons = Counter(
        (asker, caller) for verdict in early for asker, caller in {(e[0], e[1]) for e in verdict["early"]}
    )
    for (asker, caller), count in reasons.most_common(40):
        print(f"    {count:4d} models: {asker} at {caller}")


if __name__ == "__main__":
    sys.exit(main())
