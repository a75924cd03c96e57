"""Loading and quantizing are measured, in tiny, and what is loaded is what the files hold. No test looks at a clock."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.bench.by_state import ByState
from tests.bench.checkpoint_files import (
    SHAPES,
    Files,
    drop,
    fingerprint,
    is_cached,
    kept_bytes,
    make,
    num_parameters,
    read_all,
)
from tests.bench.construct import digest
from tests.bench.floors import TOUCH, TOUCHES
from tests.bench.goal import Goal
from tests.bench.load import change
from tests.bench.load_goals import Ratios
from tests.bench.load_section import load
from tests.bench.load_ways import WAYS
from tests.bench.measure import Numbers, Series
from tests.bench.model import SIZES, Decoder
from tests.bench.quantize_section import quantize
from tests.bench.section import Section
from tests.bench.state import STATES, TOUCHED, UNTOUCHED

# A process or two for each way, on machines that do other things, too.
pytestmark = pytest.mark.timeout(900)

WITH_BITSANDBYTES = find_spec("nucleate_bitsandbytes") is not None
#: What a way to load imports besides torch, safetensors and transformers.
PACKAGES = {
    "accelerate": "accelerate",
    "accelerate-in-model": "accelerate",
    "fabric": "lightning",
    "fabric-load-file": "lightning",
    "fabric-load-file-assign": "lightning",
    "fabric-ranks": "lightning",
    "fastsafetensors": "fastsafetensors",
    "runai": "runai_model_streamer",
}
LOADED = [name for name in WAYS if find_spec(PACKAGES.get(name, "torch")) is not None]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def loaded(files: Path) -> Section:
    """Every way to load from files in memory into bf16, once: each is a process or two."""
    return load("micro", 1, ["bf16", "ranks"], LOADED, files, [TOUCHED])


def test_every_way_to_load_gives_the_weights_of_the_files(loaded: Section, files: Path) -> None:
    expected = Files(files, "micro", "bf16").weights()
    assert {name: one.failure for name, one in loaded.series.items() if one.failure is not None} == {}
    bare = {f"{part} {touch} touched" for part in ("bf16", "ranks") for touch in TOUCHES}
    ways = {name: one for name, one in loaded.series.items() if name not in bare}
    assert {name for name, one in ways.items() if one.values("weights") != [expected]} == set()
    assert len(ways) == len(LOADED)
    assert bare < set(loaded.series)


def test_a_table_says_whether_a_model_holds_private_memory_or_mapped_files(loaded: Section) -> None:
    held = {
        way: [loaded.series[f"bf16 {way} touched"].values(f"{kind}_bytes")[0] for kind in ("private", "mapped")]
        for way in LOADED
        if WAYS[way].ranks == 1
    }
    weights = kept_bytes(SHAPES["micro"], "bf16")
    in_files = {way for way, (_, mapped) in held.items() if mapped >= weights}
    in_memory = {way for way, (private, _) in held.items() if private >= weights}
    assert {"nucleate-mmap", "load-file", "torch-mmap", "transformers"} <= in_files
    assert {"nucleate", "safe-open", "dcp", "torch-load"} <= in_memory
    assert in_files | in_memory == set(held)
    if "fabric-load-file" in held:
        assert "fabric-load-file" in in_memory
        assert "fabric-load-file-assign" in in_files
    assert "| holds private, MiB | holds mapped, MiB |" in loaded.text


def test_nucleate_also_has_the_buffers_that_are_in_no_file(loaded: Section) -> None:
    assert loaded.faults == []
    assert loaded.series["ranks nucleate-fsdp touched"].values("buffers") == ["True"]
    # Torch's meta device forgets how they are made.
    assert loaded.series["bf16 safe-open touched"].values("buffers") == ["False"]


def test_weights_are_cast_while_they_are_loaded(files: Path) -> None:
    ways = ["nucleate", "transformers", "dcp"]
    section = load("micro", 1, ["fp32"], ways, files, STATES, idle_s=0.1)
    expected = Files(files, "micro", "bf16").weights()
    series = [section.series[f"fp32 {way} {state}"] for way in ways for state in STATES]
    assert [one.values("weights") for one in series] == [[expected]] * 6
    assert "| build + load, untouched, s | build + load, touched, s |" in section.text
    assert "| fp32 to bf16, untouched, time when touched and of touching page by page | ≤ 1 | " in section.text
    assert "| fp32 to bf16, peak RSS of transformers | ≤ 0.35 | " in section.text


def test_a_cold_load_is_measured_beside_the_disk(files: Path) -> None:
    section = load("micro", 1, ["cold"], ["nucleate"], files, [UNTOUCHED], idle_s=0.1)
    # A file system in memory has nothing cold.
    failures = {one.failure for one in section.series.values()} - {None}
    assert all("still in the page cache" in str(failure) for failure in failures)
    if not failures:
        assert section.faults == []
        assert "| not in memory, the disk's sequential rate, untouched | ≥ 0.9 | " in section.text


def test_untouched_memory_may_cost_what_touching_it_costs() -> None:
    def runs(untouched_s: float, touched_s: float) -> ByState:
        times = {UNTOUCHED: untouched_s, TOUCHED: touched_s}
        return ByState({state: Series([{"load_s": value}]) for state, value in times.items()})

    taken = {TOUCH: runs(2.0, 1.0), "quick": runs(5.0, 3.0), "slow": runs(6.0, 3.0)}
    assert Ratios(taken, STATES).first_touch("", "quick").is_met
    slow = Ratios(taken, STATES).first_touch("", "slow")
    assert slow.value == 1.2
    assert slow.is_met is False
    assert Ratios(taken, STATES).first_touch("", "absent").is_met is None


def test_a_goal_says_whether_it_is_met() -> None:
    assert Goal("", 0.5, 0.5).is_met
    assert not Goal("", 0.51, 0.5).is_met
    assert Goal("", 0.95, 0.9, at_least=True).is_met
    assert Goal("", None, 0.9).row()[-1] == "not measured"


def test_weights_that_are_not_those_of_the_files_are_a_fault(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("first_use_s", "load_s", "cpu_s", "ready_s", "peak_bytes", "rss_bytes", "kept_bytes", "rss_over_kept")
    numbers: Numbers = dict.fromkeys((*keys, "private_bytes", "mapped_bytes", "threads"), 1.0)
    wrong = {"nucleate": ByState({TOUCHED: Series([numbers | {"weights": "other", "buffers": "True"}])})}
    monkeypatch.setattr("tests.bench.load_section.take_in_states", lambda *args, **kwargs: wrong)
    section = load("micro", 1, ["bf16"], ["nucleate"], files, [TOUCHED])
    assert section.faults == ["load bf16 nucleate: the weights are wrong"]
    assert "| **no** | yes |" in section.text


def test_what_a_model_without_values_costs_is_measured() -> None:
    section = load("micro", 1, ["fixed"])
    assert section.series["fixed nucleate"].failure is None
    assert section.series["fixed nucleate"].median("first_s") < section.series["fixed meta"].median("first_s")


@pytest.mark.skipif(not WITH_BITSANDBYTES, reason="nucleate-bitsandbytes is not installed")
def test_what_is_quantized_while_loading_is_what_transformers_makes(files: Path) -> None:
    section = quantize("micro", 1, files, STATES, idle_s=0.1)
    assert section.faults == []
    assert section.text.count("| yes | yes | yes |") == 2
    # Four attention and three MLP matrices in each of two layers; not the head.
    loaded = [one for name, one in section.series.items() if "touch-" not in name]
    assert [one.values("num_quantized") for one in loaded] == [[14]] * 8
    assert len({one.values("codes")[0] for one in loaded}) == 2
    assert "| load + quantize, untouched, s | load + quantize, touched, s |" in section.text
    assert "| nf4, untouched, time when touched and of touching page by page | ≤ 1 | " in section.text
    assert "| int8, peak RSS of transformers | ≤ 0.4 | " in section.text


def test_codes_that_are_not_transformers_are_a_fault(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("first_use_s", "load_s", "cpu_s", "peak_bytes", "rss_bytes", "kept_bytes")
    numbers: Numbers = dict.fromkeys(keys, 1.0)
    right = {"num_quantized": 14, "codes": "a", "scales": "b", "rest": "c"}
    runs = {"nucleate": [numbers | right | {"codes": "d"}], "transformers": [numbers | right]}
    taken = {way: ByState({TOUCHED: Series(one)}) for way, one in runs.items()}
    monkeypatch.setattr("tests.bench.quantize_section.take_in_states", lambda *args, **kwargs: taken)
    section = quantize("micro", 1, files, [TOUCHED])
    assert section.faults == ["quantize int8: the codes differ", "quantize nf4: the codes differ"]
    assert "| **no** | yes | yes |" in section.text
    taken["transformers"] = ByState({TOUCHED: Series(failure="gone")})
    faults = quantize("micro", 1, files, [TOUCHED]).faults
    assert faults == ["quantize int8: transformers: gone", "quantize nf4: transformers: gone"]


def test_checkpoints_are_made_once_and_hold_what_is_said(tmp_path: Path) -> None:
    make(tmp_path, "micro")
    files = Files(tmp_path, "micro", "fp32")
    before = files.torch_file.stat().st_mtime_ns
    make(tmp_path, "micro")
    assert files.torch_file.stat().st_mtime_ns == before
    state = torch.load(files.torch_file, weights_only=True)
    assert sum(value.numel() for value in state.values()) == num_parameters(SHAPES["micro"])
    assert fingerprint((key, value.bfloat16()) for key, value in state.items()) == files.weights()
    assert len(files.shards) == 5
    assert read_all(files.shards) == files.size_bytes > 4 * num_parameters(SHAPES["micro"])
    assert 1.09e9 < num_parameters(SHAPES["1b"]) < 1.11e9


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
