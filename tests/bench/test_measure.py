"""Measurements: their order, their failures, and memory as they see it."""

from __future__ import annotations

import mmap
import time
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

from tests.bench.bare import read, touch
from tests.bench.by_state import take_in_states
from tests.bench.held import Held
from tests.bench.measure import MeasurementError, Numbers, in_process, take
from tests.bench.memory import Peak, SampledPeak, prefault
from tests.bench.ranks import over_ranks
from tests.bench.state import STATES, TOUCHED, UNTOUCHED, enter

MIB = 2**20


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


def test_measurements_are_taken_in_turn_and_a_failing_one_not_again() -> None:
    taken: list[str] = []

    def measure(name: str) -> dict[str, float]:
        taken.append(name)
        if name == "b":
            raise MeasurementError("no such thing")
        return {"s": float(len(taken))}

    series = take({name: lambda name=name: measure(name) for name in "abcd"}, 2, once=["d"])  # type: ignore[misc]
    assert taken == ["a", "b", "c", "d", "c", "a"]
    assert series["b"].failure == "no such thing"
    assert series["a"].median("s") == 3.5


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


def test_each_way_is_measured_in_every_state_before_the_next_way() -> None:
    taken: list[str] = []

    def measure(name: str, state: str) -> Numbers:
        taken.append(f"{name} {state}")
        if name == "b" and state == TOUCHED:
            raise MeasurementError("no such thing")
        return {"s": len(taken), "right": True}

    measurements = {name: partial(measure, name) for name in "ab"}
    by_state = take_in_states(measurements, STATES, 2)
    assert taken[:4] == ["a untouched", "a touched", "b untouched", "b touched"]
    # Another one is first in the next run, and what failed is not tried again.
    assert taken[4:] == ["a touched", "b untouched", "a untouched"]
    assert by_state["a"].median("s", UNTOUCHED) == 4.0
    assert by_state["a"].median("s", TOUCHED) == 3.5
    assert by_state["a"].median("s") == 3.5
    assert by_state["a"].every("right", True)
    assert by_state["b"].failure == "no such thing"
    assert by_state["b"].median("s", UNTOUCHED) == 4.5
    assert by_state["b"].median("s", TOUCHED) is None


def test_only_memory_that_is_to_be_untouched_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr("tests.bench.state.time.sleep", lambda seconds: done.append(f"idle {seconds} s"))
    monkeypatch.setattr("tests.bench.state.prefault", lambda size_bytes: done.append(f"touch {size_bytes}"))
    enter(UNTOUCHED, 4096, idle_s=4.0)
    enter(TOUCHED, 4096, idle_s=4.0)
    assert done == ["idle 4.0 s", "touch 4096"]


def test_a_models_memory_is_told_from_mapped_files(tmp_path: Path) -> None:
    model = nn.Linear(512, 512)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert Held.by(model) == Held(private_bytes=num_bytes, mapped_bytes=0)
    save_file(model.state_dict(), tmp_path / "file")
    model.load_state_dict(load_file(tmp_path / "file"), assign=True)
    assert Held.by(model) == Held(private_bytes=0, mapped_bytes=num_bytes)
    model.weight = nn.Parameter(model.weight.detach().clone())
    assert Held.by(model) == Held(model.weight.nbytes, model.bias.nbytes)


@pytest.mark.parametrize("how", ["pages", "huge", "populate"])
def test_touching_takes_the_memory_it_says(how: str) -> None:
    peak = Peak()
    assert touch(40 * MIB, threads=2, huge=how == "huge", populate=how == "populate") == 40 * MIB
    assert 39 * MIB < peak.added_bytes() < 50 * MIB


@pytest.mark.parametrize("direct", [True, False])
def test_bare_reading_reads_every_byte(tmp_path: Path, direct: bool) -> None:
    paths = [tmp_path / "large", tmp_path / "odd"]
    paths[0].write_bytes(bytes(20 * MIB))
    paths[1].write_bytes(bytes(4097))
    try:
        assert read(paths, threads=3, direct=direct) == 20 * MIB + 4097
    except OSError:
        # A file system in memory has no way past the page cache.
        assert direct


def test_the_worst_of_the_ranks_counts() -> None:
    assert over_ranks([1.0, 3.0, 2.0]) == 3.0
    assert over_ranks([1.0, None]) is None
    assert over_ranks(["a", "a"]) == "a"
    assert over_ranks(["a", "b"]) == "the ranks differ"
