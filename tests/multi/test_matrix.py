"""Every strategy's checkpoint goes on exactly under every other strategy, in every format."""

from pathlib import Path

from tests.multi.ranks import run_ranks
from tests.multi.scripts.matrix import FORMATS, OTHER_POLICIES, STRATEGIES

SCRIPT = Path(__file__).parent / "scripts" / "matrix.py"


def test_what_any_strategy_saves_goes_on_exactly_under_any_other(tmp_path: Path) -> None:
    for world_size in (1, 2, 4):
        run_ranks(SCRIPT, world_size, "save", tmp_path, timeout=120)
    lines: list[str] = []
    for world_size in (1, 2, 4):
        lines += run_ranks(SCRIPT, world_size, "load", tmp_path, timeout=240).stdout.splitlines()
    cells = [line for line in lines if line.startswith("cell ")]
    assert [cell for cell in cells if not cell.endswith(" exact")] == []
    loading = [*STRATEGIES, *OTHER_POLICIES]
    expected = [f"cell {s} {name} {format} exact" for s in STRATEGIES for name in loading for format in FORMATS]
    assert sorted(cells) == sorted(expected)
