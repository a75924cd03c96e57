"""The benchmarks run, in tiny, and what they compare is equal. Nothing here looks at a clock."""

from __future__ import annotations

import mmap
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.bench.__main__ import BENCHMARKS, PAGE, main
from tests.bench.checkpoint_files import SHAPES, Files, drop, fingerprint, is_cached, make, read_all
from tests.bench.checkpoint_files import num_parameters as num_loaded
from tests.bench.construct import WAYS, digest
from tests.bench.load import WAYS as LOAD_WAYS
from tests.bench.load import change
from tests.bench.load_section import Goal, load
from tests.bench.measure import MeasurementError, Series, in_process, take
from tests.bench.memory import Peak, SampledPeak, prefault
from tests.bench.model import SIZES, Decoder, num_parameters
from tests.bench.page import write_section
from tests.bench.quantize_section import quantize
from tests.bench.sections import LOOPS, Section, construct, imports, step
from tests.bench.when import SIZES as WHEN_SIZES
from tests.bench.when import num_parameters as num_constructed
from tests.bench.when import shape
from tests.bench.when_section import KINDS, Point, Setting, rule, smallest, when

# A process or two for each way, on machines that do other things, too.
pytestmark = pytest.mark.timeout(900)

WITH_FABRIC = find_spec("lightning") is not None
WITH_BITSANDBYTES = find_spec("nucleate_bitsandbytes") is not None


OURS = [name for name, way in WAYS.items() if way.ours]
FABRIC = [name for name in WAYS if name.startswith("fabric") and name != "fabric-fsdp"]

#: What a way to load imports besides torch, safetensors and transformers.
PACKAGES = {
    "accelerate": "accelerate",
    "accelerate-in-model": "accelerate",
    "fabric": "lightning",
    "fabric-ranks": "lightning",
    "fastsafetensors": "fastsafetensors",
    "runai": "runai_model_streamer",
}
LOADED = [name for name in LOAD_WAYS if find_spec(PACKAGES.get(name, "torch")) is not None]


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


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def loaded(files: Path) -> Section:
    """Every way to load from files in memory into bf16, once: each is a process or two."""
    return load("micro", 1, ["bf16", "ranks"], LOADED, files)


def test_every_way_to_load_gives_the_weights_of_the_files(loaded: Section, files: Path) -> None:
    expected = Files(files, "micro", "bf16").weights()
    assert {name: one.failure for name, one in loaded.series.items() if one.failure is not None} == {}
    assert {name for name, one in loaded.series.items() if one.values("weights") != [expected]} == set()
    assert len(loaded.series) == len(LOADED)


def test_nucleate_also_has_the_buffers_that_are_in_no_file(loaded: Section) -> None:
    assert loaded.faults == []
    assert loaded.series["ranks nucleate-fsdp"].values("buffers") == ["True"]
    # Torch's meta device forgets how they are made.
    assert loaded.series["bf16 safe-open"].values("buffers") == ["False"]


def test_weights_are_cast_while_they_are_loaded(files: Path) -> None:
    section = load("micro", 1, ["fp32"], ["nucleate", "transformers", "dcp"], files)
    expected = Files(files, "micro", "bf16").weights()
    assert [one.values("weights") for one in section.series.values()] == [[expected]] * 3
    assert "| fp32 to bf16, peak RSS of transformers | ≤ 0.35 | " in section.text


def test_a_goal_says_whether_it_is_met() -> None:
    assert Goal("", 0.5, 0.5).is_met
    assert not Goal("", 0.51, 0.5).is_met
    assert Goal("", 0.95, 0.9, at_least=True).is_met
    assert Goal("", None, 0.9).row()[-1] == "not measured"


def test_weights_that_are_not_those_of_the_files_are_a_fault(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = {"load_s": 1.0, "weights": "other", "buffers": "True"}
    numbers = dict.fromkeys(
        ("first_use_s", "cpu_s", "ready_s", "peak_bytes", "rss_bytes", "kept_bytes", "rss_over_kept"), 1.0
    )
    series = {"nucleate": Series([right | numbers | {"threads": 1}])}
    monkeypatch.setattr("tests.bench.load_section.take", lambda *args, **kwargs: series)
    section = load("micro", 1, ["bf16"], ["nucleate"], files)
    assert section.faults == ["load bf16 nucleate: the weights are wrong"]
    assert "| **no** | yes |" in section.text


def test_what_a_model_without_values_costs_is_measured() -> None:
    section = load("micro", 1, ["fixed"])
    assert section.series["fixed nucleate"].failure is None
    assert section.series["fixed nucleate"].median("first_s") < section.series["fixed meta"].median("first_s")


@pytest.mark.skipif(not WITH_BITSANDBYTES, reason="nucleate-bitsandbytes is not installed")
def test_what_is_quantized_while_loading_is_what_transformers_makes(files: Path) -> None:
    section = quantize("micro", 1, files)
    assert section.faults == []
    assert section.text.count("| yes | yes | yes |") == 2
    # Four attention and three MLP matrices in each of two layers; not the head.
    assert [one.values("num_quantized") for one in section.series.values()] == [[14]] * 4
    assert len({one.values("codes")[0] for one in section.series.values()}) == 2
    assert "| int8, peak RSS of transformers | ≤ 0.4 | " in section.text


def test_codes_that_are_not_transformers_are_a_fault(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = dict.fromkeys(("first_use_s", "load_s", "cpu_s", "peak_bytes", "rss_bytes", "kept_bytes"), 1.0)
    right = {"num_quantized": 14, "codes": "a", "scales": "b", "rest": "c"}
    series = {"nucleate": Series([numbers | right | {"codes": "d"}]), "transformers": Series([numbers | right])}
    monkeypatch.setattr("tests.bench.quantize_section.take", lambda *args, **kwargs: series)
    section = quantize("micro", 1, files)
    assert section.faults == ["quantize int8: the codes differ", "quantize nf4: the codes differ"]
    assert "| **no** | yes | yes |" in section.text
    series["transformers"] = Series(failure="gone")
    faults = quantize("micro", 1, files).faults
    assert faults == ["quantize int8: transformers: gone", "quantize nf4: transformers: gone"]


def test_checkpoints_are_made_once_and_hold_what_is_said(tmp_path: Path) -> None:
    make(tmp_path, "micro")
    files = Files(tmp_path, "micro", "fp32")
    before = files.torch_file.stat().st_mtime_ns
    make(tmp_path, "micro")
    assert files.torch_file.stat().st_mtime_ns == before
    state = torch.load(files.torch_file, weights_only=True)
    assert sum(value.numel() for value in state.values()) == num_loaded(SHAPES["micro"])
    assert fingerprint((key, value.bfloat16()) for key, value in state.items()) == files.weights()
    assert len(files.shards) == 5
    assert read_all(files.shards) == files.size_bytes > 4 * num_loaded(SHAPES["micro"])
    assert 1.09e9 < num_loaded(SHAPES["1b"]) < 1.11e9


def test_a_file_that_is_dropped_is_not_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2**22))
    assert is_cached(path)
    try:
        drop([path])
    except RuntimeError:  # A file system in memory: a cold measurement stops there.
        dropped = False
    else:
        dropped = True
    assert is_cached(path) is not dropped


def test_what_is_changed_in_place_twice_is_what_it_was() -> None:
    model = Decoder(SIZES["micro"])
    before = digest(model)
    change(model)
    assert digest(model) != before
    change(model)
    assert digest(model) == before


def test_a_sampled_peak_sees_memory_but_not_mapped_files(tmp_path: Path) -> None:
    num_bytes = 64 * 2**20
    path = tmp_path / "file"
    path.write_bytes(bytes(num_bytes))
    sampled = SampledPeak()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) == 0
    memory = bytearray(num_bytes // 2)
    time.sleep(0.5)
    del memory
    assert 0.9 * num_bytes / 2 < sampled.added_bytes() < 1.2 * num_bytes / 2


def test_deferred_models_of_every_size_are_eagers_and_the_picture_is_drawn(tmp_path: Path) -> None:
    section = when(1, ["1m"], ["touched"], [1])
    assert section.faults == []
    # Eager and deferred, few and many, in two dtypes; a cast; and twice without an answer.
    assert len(section.series) == 2 * 2 * 2 + 1 + 2
    for text in ("**The rule", "| many small | bf16 | 1 | touched | ", "ns for each element"):
        assert text in section.text
    pytest.importorskip("matplotlib")
    assert section.draw is not None
    section.draw(tmp_path)
    text = (tmp_path / "when-deferring-pays.svg").read_text()
    assert all(f"{words} tensors, bf16" in text for words in KINDS.values())


def test_models_of_few_and_of_many_tensors_have_the_size_that_is_said() -> None:
    for kind in KINDS:
        for size, wanted in WHEN_SIZES.items():
            assert 0.98 * wanted < num_constructed(kind, size) < 1.02 * wanted
    assert shape("many", "1m") == (240, 64)
    assert shape("many", "2b")[0] == 1000


def point(kind: str, size: str, eager_s: float, deferred_s: float, state: str = "touched") -> Point:
    seconds = {"eager": eager_s, "nucleate": deferred_s}
    return Point(Setting(kind, "fp32", 1, state), size, seconds, dict.fromkeys(seconds, 4e6))


def test_the_rule_is_the_size_from_which_on_no_setting_is_slower() -> None:
    points = [
        point("few", "1m", 1.0, 3.0),
        point("few", "4m", 1.0, 0.9),
        point("few", "16m", 1.0, 0.5),
        point("few", "1m", 1.0, 0.9, "untouched"),
        point("few", "4m", 1.0, 2.0, "untouched"),
        point("few", "16m", 1.0, 1.04, "untouched"),
    ]
    assert smallest(points, lambda each: each.num_parameters) == num_constructed("few", "16m")
    assert "weights of a model have 1 million elements or more" in rule(points)
    assert "For few large tensors it pays from 16 million parameters on" in rule(points)
    slow = [*points, point("few", "64m", 1.0, 1.1)]
    assert smallest(slow, lambda each: each.num_parameters) is None
    assert "there is no size from which on deferring pays" in rule(slow)


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
