"""The benchmarks run, in tiny, and what they compare is equal. Nothing here looks at a clock."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.bench.__main__ import PAGE, main
from tests.bench.construct import WAYS, digest
from tests.bench.measure import MeasurementError, in_process, take
from tests.bench.memory import Peak, prefault
from tests.bench.model import SIZES, Decoder, num_parameters
from tests.bench.page import write_section
from tests.bench.sections import LOOPS, Section, construct, imports, step

# A process or two for each way, on machines that do other things, too.
pytestmark = pytest.mark.timeout(900)

WITH_FABRIC = find_spec("lightning") is not None


OURS = [name for name, way in WAYS.items() if way.ours]
FABRIC = [name for name in WAYS if name.startswith("fabric") and name != "fabric-fsdp"]


@pytest.fixture(scope="module")
def plain() -> Section:
    """Every way, once: each is a process or two."""
    return construct("micro", 1, ["plain"], [name for name in WAYS if WITH_FABRIC or name not in FABRIC])


def test_the_weights_and_the_stream_of_nucleate_are_eagers(plain: Section) -> None:
    eager = plain.series["plain eager"]
    for way in OURS:
        ours = plain.series[f"plain {way}"]
        assert ours.failure is None
        assert ours.values("weights") == eager.values("weights")
        assert ours.values("stream") == eager.values("stream")
    assert plain.faults == []


def test_they_are_when_the_constructor_draws_them_twice() -> None:
    section = construct("micro", 1, ["again"], ["eager", *OURS])
    assert section.faults == []
    assert section.text.count("| yes | yes |") == 1 + len(OURS)


def test_raw_torch_runs(plain: Section) -> None:
    for way in ("eager-ranks", "shard-eager", "ddp"):
        assert plain.series[f"plain {way}"].values("weights") == plain.series["plain eager"].values("weights")


def test_weights_that_are_not_eagers_are_seen(plain: Section) -> None:
    assert plain.series["plain shard-meta"].failure is None
    assert plain.series["plain shard-meta"].values("weights") != plain.series["plain eager"].values("weights")
    assert "| **no** |" in plain.text


@pytest.mark.skipif(not WITH_FABRIC, reason="Lightning Fabric is not installed")
def test_fabric_runs(plain: Section) -> None:
    assert [plain.series[f"plain {way}"].failure for way in FABRIC] == [None] * len(FABRIC)


@pytest.mark.parametrize("loop", [name for name in LOOPS if name != "fabric" or WITH_FABRIC])
def test_wrappers_do_not_change_the_losses(loop: str) -> None:
    section = step(["micro"], 1, [loop], quick=True)
    assert section.series[f"micro {loop}"].values("same_losses") == [True]
    assert section.faults == []


def test_imports_are_measured() -> None:
    section = imports(1, ["nucleate-made"])
    assert section.series["nucleate-made"].failure is None
    assert section.faults == []


def test_a_table_is_written_into_its_section_of_the_page(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- step -->\nold\n<!-- /step -->\n\nafter\n")
    arguments = ["step", "--step-sizes", "micro", "--runs", "1", "--quick", "--write", "--page", str(page)]
    main(arguments)
    before, table, after = page.read_text().partition("| nucleate |")
    assert before.startswith("before\n\n<!-- step -->\n\n### ")
    assert table in capfd.readouterr().out
    assert after.endswith("<!-- /step -->\n\nafter\n")
    assert "old" not in page.read_text()


def test_the_page_has_a_section_for_every_benchmark(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text(encoding="utf-8"))
    for name in ("init", "record", "step", "imports"):
        write_section(page, name, f"the numbers of {name}")
        assert f"the numbers of {name}" in page.read_text()
    with pytest.raises(ValueError, match="needs exactly one section"):
        write_section(page, "unheard of", "")


def test_measurements_are_taken_in_turn_and_a_failing_one_not_again() -> None:
    taken: list[str] = []

    def measure(name: str) -> dict[str, float]:
        taken.append(name)
        if name == "b":
            raise MeasurementError("no such thing")
        return {"s": float(len(taken))}

    series = take({name: lambda name=name: measure(name) for name in "abcd"}, 2, once=["d"])  # type: ignore[misc]
    assert taken == ["a", "b", "c", "d", "a", "c"]
    assert series["b"].failure == "no such thing"
    assert series["a"].median("s") == 3.0


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(MeasurementError, match="^ValueError: of no use$"):
        in_process("-c", "raise ValueError('of no use')")


def test_the_peak_is_what_was_taken_in_between() -> None:
    num_bytes = 64 * 2**20
    prefault(2 * num_bytes)
    peak = Peak()
    memory = bytearray(num_bytes)
    del memory
    assert 0.9 * num_bytes < peak.added_bytes() < 1.1 * num_bytes


def test_models_have_the_size_that_is_said() -> None:
    model = Decoder(SIZES["1m"])
    assert sum(p.numel() for p in model.parameters()) == num_parameters(SIZES["1m"])
    assert 1.0e9 < num_parameters(SIZES["1b"]) < 1.1e9


def test_a_digest_sees_a_single_bit() -> None:
    model = Decoder(SIZES["micro"])
    before = digest(model)
    assert digest(model) == before
    model.head.weight.data[0, 0] *= -1
    assert digest(model) != before
