"""The large checkpoint, in tiny: what is written, what is loaded, and the floors beside it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM

from tests.bench.by_state import ByState
from tests.bench.checkpoint_files import SHAPES, kept_bytes, num_parameters
from tests.bench.large import WAYS, second_token
from tests.bench.large_files import large_files, make, sampled_fingerprint
from tests.bench.large_section import floor_s, large
from tests.bench.measure import Series
from tests.bench.section import Section
from tests.bench.state import UNTOUCHED

# A process or two for each way, on machines that do other things, too.
pytestmark = pytest.mark.timeout(900)

WITH_BITSANDBYTES = find_spec("nucleate_bitsandbytes") is not None
MEASURED = [name for name, way in WAYS.items() if way.kept == "bf16" or WITH_BITSANDBYTES]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def measured(files: Path) -> Section:
    """Every way, once: each is a process or two."""
    return large("micro", 1, MEASURED, files, [UNTOUCHED], idle_s=0.1)


def loaded_by_transformers(root: Path) -> Any:
    folder = large_files(root, "micro").folder
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)


def on_disk(section: Section) -> bool:
    """Return whether there was anything cold: a file system in memory has nothing."""
    return not any("still in the page cache" in str(one.failure) for one in section.series.values())


def test_the_large_checkpoint_is_three_files_that_transformers_reads(tmp_path: Path) -> None:
    make(tmp_path, "micro")
    files = large_files(tmp_path, "micro")
    assert len(files.shards) == 3
    weight_map = json.loads((files.folder / "model.safetensors.index.json").read_text())["weight_map"]
    for path in files.shards:
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == {key for key, name in weight_map.items() if name == path.name}
    model = loaded_by_transformers(tmp_path)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(SHAPES["micro"])
    assert sampled_fingerprint(model) == files.weights()
    assert model.model.norm.weight.mean().item() == pytest.approx(1.0, abs=0.05)


def test_one_wrong_element_in_a_row_is_seen_where_it_is_sampled(files: Path) -> None:
    make(files, "micro")
    model = loaded_by_transformers(files)
    model.lm_head.weight.data.view(-1)[509] += 1
    assert sampled_fingerprint(model) != large_files(files, "micro").weights()


def test_it_is_written_once(files: Path) -> None:
    make(files, "micro")
    before = [path.stat().st_mtime_ns for path in large_files(files, "micro").shards]
    make(files, "micro")
    assert [path.stat().st_mtime_ns for path in large_files(files, "micro").shards] == before


def test_a_7b_is_of_the_size_of_llama_2() -> None:
    assert num_parameters(SHAPES["7b"]) == 6_738_415_616
    # Codes of a byte or half of one, scales, and the head and the embedding in bf16.
    assert kept_bytes(SHAPES["7b"], "bf16") == 2 * 6_738_415_616
    assert 6.9e9 < kept_bytes(SHAPES["7b"], "int8") < 7.1e9
    assert 4.0e9 < kept_bytes(SHAPES["7b"], "nf4") < 4.3e9


def test_every_way_loads_the_large_checkpoint(measured: Section, files: Path) -> None:
    if not on_disk(measured):
        return
    assert measured.faults == []
    expected = large_files(files, "micro").weights()
    for name in MEASURED:
        one = measured.series[f"{name} untouched"]
        assert one.failure is None
        if WAYS[name].kept == "bf16":
            assert one.values("weights") == [expected]
        else:
            assert one.values("num_quantized") == [14]
    # Those that are used from the files hold them mapped; the others hold memory of their own.
    for name in ("nucleate-mmap", "transformers"):
        assert measured.series[f"{name} untouched"].values("mapped_bytes")[0] >= kept_bytes(SHAPES["micro"], "bf16")
    assert measured.series["nucleate untouched"].values("mapped_bytes") == [0]


def test_floors_and_goals_stand_beside_them(measured: Section) -> None:
    if not on_disk(measured):
        return
    for label in ("bare reading, past the page cache", "bare reading, through the page cache"):
        assert f"| {label} |" in measured.text
    assert "| bare touching of what is kept: bf16 |" in measured.text
    reading = "time of the larger of bare reading and bare touching | ≤ 1.2 | "
    assert f"| bf16, untouched, {reading}" in measured.text
    assert f"| bf16, 2 FSDP ranks, untouched, {reading}" in measured.text
    assert "| second token with `mmap=True`, untouched, time of transformers | ≤ 1 | " in measured.text


def test_the_floor_is_the_larger_of_touching_and_the_faster_reading() -> None:
    times = {"read-direct": 3.0, "read-buffered": 4.0, "touch-bf16": 2.0, "touch-nf4": 5.0}
    taken = {name: ByState({UNTOUCHED: Series([{"load_s": value}])}) for name, value in times.items()}
    assert floor_s(taken, "bf16", UNTOUCHED) == 3.0
    assert floor_s(taken, "nf4", UNTOUCHED) == 5.0
    assert floor_s(taken, "int8", UNTOUCHED) is None


def test_tokens_are_those_of_greedy_generation(files: Path) -> None:
    make(files, "micro")
    model = loaded_by_transformers(files)
    prompt = torch.arange(1, 9)[None]
    generated = model.generate(prompt, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert second_token(model) == generated[0, -2:].tolist()
