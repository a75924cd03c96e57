"""The benchmarks run, in tiny, and what they compare is equal. Nothing here looks at a clock."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.bench import launch as bench_launch
from tests.bench import recordings
from tests.bench.__main__ import BENCHMARKS, PAGE, main
from tests.bench.construct import digest
from tests.bench.construct_ways import WAYS
from tests.bench.init_section import construct
from tests.bench.measure import Numbers
from tests.bench.model import SIZES, Decoder, num_parameters
from tests.bench.page import write_section
from tests.bench.section import Section
from tests.bench.sections import LOOPS, imports, step
from tests.bench.state import STATES, TOUCHED

# A process or two for each way, on machines that do other things, too.
pytestmark = pytest.mark.timeout(900)

WITH_FABRIC = find_spec("lightning") is not None

OURS = [name for name, way in WAYS.items() if way.ours]
FABRIC = [name for name in WAYS if name.startswith("fabric") and name != "fabric-fsdp"]


@pytest.fixture(scope="module")
def plain() -> Section:
    """Every way, once: each is a process or two."""
    ways = [name for name in WAYS if WITH_FABRIC or name not in FABRIC]
    return construct("micro", 1, ["plain"], ways, ["fp32"], [TOUCHED])


def made(section: Section, way: str, key: str = "weights") -> object:
    """Return what a way gave."""
    series = section.series[f"plain fp32 {way} touched"]
    assert series.failure is None
    return series.values(key)


def test_the_weights_and_the_stream_of_nucleate_are_eagers(plain: Section) -> None:
    for way in OURS:
        assert made(plain, way) == made(plain, "eager")
        assert made(plain, way, "stream") == made(plain, "eager", "stream")
    assert plain.faults == []


@pytest.mark.parametrize(("init", "dtype"), [("again", "fp32"), ("llama", "bf16")])
def test_they_are_when_weights_are_drawn_twice_and_in_bf16(init: str, dtype: str) -> None:
    section = construct("micro", 1, [init], ["eager", *OURS], [dtype], [TOUCHED])
    assert section.faults == []
    assert section.text.count("| yes | yes |") == 1 + len(OURS)


def test_both_states_of_memory_stand_side_by_side() -> None:
    section = construct("micro", 2, ["plain"], ["eager", "nucleate"], ["bf16"], STATES, idle_s=0.1)
    assert "| build, untouched, s | build, touched, s |" in section.text
    assert [len(one.runs) for one in section.series.values()] == [2] * 8
    assert "| the memory: as many bytes as are kept, touched in huge pages |" in section.text
    assert "| plain in bf16, untouched, time of eager | ≤ 0.7 | " in section.text
    assert "| plain in bf16, touched, time of eager | ≤ 0.7 | " in section.text


def test_raw_torch_runs(plain: Section) -> None:
    for way in ("eager-ranks", "shard-eager", "ddp"):
        assert made(plain, way) == made(plain, "eager")


def test_weights_that_are_not_eagers_are_seen(plain: Section) -> None:
    assert made(plain, "shard-meta") != made(plain, "eager")
    assert "| **no** |" in plain.text


@pytest.mark.skipif(not WITH_FABRIC, reason="Lightning Fabric is not installed")
def test_fabric_runs(plain: Section) -> None:
    assert [plain.series[f"plain fp32 {way} touched"].failure for way in FABRIC] == [None] * len(FABRIC)


@pytest.mark.parametrize("loop", [name for name in LOOPS if name != "fabric" or WITH_FABRIC])
def test_wrappers_do_not_change_the_losses(loop: str) -> None:
    section = step(["micro"], 1, [loop], quick=True)
    assert section.series[f"micro {loop}"].values("same_losses") == [True]
    assert section.faults == []


def test_imports_are_measured() -> None:
    section = imports(1, ["nucleate-made"])
    assert section.series["nucleate-made"].failure is None
    assert section.faults == []


def test_a_launch_of_two_ranks_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def time(library: str, way: str) -> Numbers:
        asked.append((library, way))
        return {"wall_s": 1.0 if library == "nucleate" else 4.0}

    whole = bench_launch.time_program("nucleate", "function")
    assert whole["wall_s"] > 0
    monkeypatch.setattr(bench_launch, "time_program", time)
    section = bench_launch.launch(1, ["script"])
    assert "| 0.25 | yes |" in section.text
    assert section.faults == []
    assert asked[-2:] == [("nucleate", "script"), ("fabric", "script")]


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
    for name in BENCHMARKS:
        write_section(page, name, f"the numbers of {name}")
        assert f"the numbers of {name}" in page.read_text()
    with pytest.raises(ValueError, match="needs exactly one section"):
        write_section(page, "unheard of", "")


def test_options_reach_the_benchmark(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, ...]] = []

    def in_process(*arguments: str, threads: int | None = None) -> Numbers:
        asked.append(arguments)
        texts = {"weights": "a", "stream": "b"}
        return texts | dict.fromkeys(("first_use_s", "wall_s", "cpu_s", "part_cpu_s", "peak_bytes"), 1.0)

    monkeypatch.setattr("tests.bench.init_section.in_process", in_process)
    monkeypatch.setattr("tests.bench.floors.in_process", lambda *arguments: {"load_s": 1.0})
    monkeypatch.setattr("tests.bench.machine.page_costs", lambda: "the costs of pages")
    options = ["--size", "1m", "--runs", "1", "--inits", "plain", "--ways", "eager", "--dtypes", "bf16"]
    assert main(["init", *options, "--states", "untouched", "--idle-s", "7"]) == 0
    [arguments] = asked
    assert " ".join(arguments).endswith("--size 1m --init plain --dtype bf16 --seed 1 --state untouched --idle-s 7.0")
    assert "the costs of pages" in capfd.readouterr().out


def test_a_size_that_only_the_large_benchmark_has_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["load", "--size", "7b"])
    assert "--size 7b is for large only" in capfd.readouterr().err


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


def test_the_question_for_a_record_is_asked_among_many_recordings(capsys: pytest.CaptureFixture[str]) -> None:
    recordings.main(["--recordings", "20", "--rounds", "1"])
    assert '"recordings": 20' in capsys.readouterr().out
