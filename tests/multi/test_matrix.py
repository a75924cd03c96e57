"""Every strategy's checkpoint goes on exactly under every other strategy, in every format."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.multi.ranks import fork_ranks
from tests.multi.scripts.matrix import FORMATS, OTHER_POLICIES, STRATEGIES

SCRIPT = Path(__file__).parent / "scripts" / "matrix.py"


def test_what_any_strategy_saves_goes_on_exactly_under_any_other(tmp_path: Path) -> None:
    def run(what: str) -> list[str]:
        # At once: most of the time goes into starting them.
        with ThreadPoolExecutor(3) as pool:
            runs = [pool.submit(fork_ranks, SCRIPT, ranks, what, tmp_path, timeout=270) for ranks in (4, 2, 1)]
            return [line for done in runs for line in done.result().stdout.splitlines()]

    run("save")
    lines = run("load")
    cells = [line for line in lines if line.startswith("cell ")]
    assert [cell for cell in cells if not cell.endswith(" exact")] == []
    loading = [*STRATEGIES, *OTHER_POLICIES]
    expected = [f"cell {s} {name} {format} exact" for s in STRATEGIES for name in loading for format in FORMATS]
    assert sorted(cells) == sorted(expected)
