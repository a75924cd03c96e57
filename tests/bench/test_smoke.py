"""The benchmarks run, in tiny, and what they compare is equal. Nothing here looks at a clock."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.bench.__main__ import PAGE, main
from tests.bench.construct import WAYS, digest
from tests.bench.measure import MeasurementError, in_process, take
from tests.bench.memory import Peak, prefault
from tests.bench.model import INITS, SIZES, Decoder, num_parameters
from tests.bench.page import write_section
from tests.bench.sections import LOOPS, construct, imports, step

WITH_FABRIC = find_spec("lightning") is not None


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("way", [name for name, way in WAYS.items() if way.ours])
def test_the_weights_and_the_stream_of_nucleate_are_eagers(way: str, init: str) -> None:
    section = construct("micro", 1, [init], ["eager", way])
    eager, ours = section.series[f"{init} eager"], section.series[f"{init} {way}"]
    assert ours.failure is None
    assert ours.values("weights") == eager.values("weights")
    assert ours.values("stream") == eager.values("stream")
    assert section.faults == []
    assert section.text.count("| yes | yes |") == 2


@pytest.mark.parametrize("way", ["eager-ranks", "shard-eager", "ddp"])
def test_raw_torch_runs(way: str) -> None:
    series = construct("micro", 1, ["plain"], ["eager", way]).series
    assert series[f"plain {way}"].values("weights") == series["plain eager"].values("weights")


def test_weights_that_are_not_eagers_are_seen() -> None:
    section = construct("1m", 1, ["plain"], ["eager", "shard-meta"])
    assert section.series["plain shard-meta"].failure is None
    assert "| **no** |" in section.text


@pytest.mark.skipif(not WITH_FABRIC, reason="Lightning Fabric is not installed")
@pytest.mark.parametrize("way", [name for name in WAYS if name.startswith("fabric") and name != "fabric-fsdp"])
def test_fabric_runs(way: str) -> None:
    assert construct("micro", 1, ["plain"], ["eager", way]).series[f"plain {way}"].failure is None


@pytest.mark.parametrize("loop", [name for name in LOOPS if name != "fabric" or WITH_FABRIC])
def test_wrappers_do_not_change_the_losses(loop: str) -> None:
    section = step(["micro"], 1, [loop], quick=True)
    assert section.series[f"micro {loop}"].values("same_losses") == [True]
    assert section.faults == []


def test_imports_are_measured() -> None:
    names = ["nucleate", "nucleate-runtime", "nucleate-made"]
    section = imports(1, names)
    assert [section.series[name].failure for name in names] == [None] * 3
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
    for name in ("init", "step", "imports"):
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
