"""A checkpoint of each strategy goes on exactly under the others, in every format."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.multi.ranks import fork_ranks
from tests.multi.scripts.matrix import cells

SCRIPT = Path(__file__).parent / "scripts" / "matrix.py"


@pytest.mark.parametrize("pairs", ["short", pytest.param("long", marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def test_what_any_strategy_saves_goes_on_exactly_under_any_other(tmp_path: Path, pairs: str) -> None:
    def run(what: str) -> list[str]:
        # At once: most of the time goes into starting them.
        with ThreadPoolExecutor(3) as pool:
            runs = [
                pool.submit(fork_ranks, SCRIPT, ranks, what, tmp_path, pairs, timeout=270 if pairs == "short" else 1700)
                for ranks in (4, 2, 1)
            ]
            return [line for done in runs for line in done.result().stdout.splitlines()]

    run("save")
    found = [line for line in run("load") if line.startswith("cell ")]
    assert [cell for cell in found if not cell.endswith(" exact")] == []
    assert sorted(found) == sorted(
        f"cell {left} {right} {format} exact" for left, right, format in cells(pairs == "long")
    )
