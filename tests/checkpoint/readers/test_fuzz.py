"""Whatever a file holds, a reader reads it or raises a CheckpointError: soon, and within the file's size.

`tests/fuzz` runs the same targets for hours.
"""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nucleate.checkpoint.readers import open_checkpoint
from nucleate.errors import CheckpointError
from tests.checkpoint.readers.reading import write_raw
from tests.fuzz.targets import TARGETS, folder, small_state

each_target = pytest.mark.parametrize("name", TARGETS)
#: What the objects of a header take beside the bytes that it is made of.
OVERHEAD_BYTES, PER_BYTE = 8 << 20, 200
SECONDS = 5.0


@cache
def seeds(name: str) -> list[bytes]:
    found = TARGETS[name].seeds()
    # Also for what is imported and remembered at the first time.
    TARGETS[name].run(b"")
    assert all(TARGETS[name].run(seed) for seed in found), "nothing is wrong with a seed"
    return found


@st.composite
def mutated(draw: st.DrawFn, name: str) -> bytes:
    """A checkpoint in which a few things were changed, as disks, networks and people change them."""
    data = bytearray(draw(st.sampled_from(seeds(name))))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 5)):
            case 0:
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
            case 1:
                width = draw(st.sampled_from([1, 2, 4, 8]))
                number = draw(st.integers(0, 256**width - 1) | st.sampled_from([0, 256**width - 1, 256**width // 2]))
                data[place : place + width] = number.to_bytes(width, "little")
            case 2:
                del data[place : place + draw(st.integers(1, 40))]
            case 3:
                data[place:place] = draw(st.binary(max_size=40))
            case 4:
                begin = draw(st.integers(0, len(data)))
                data[place:place] = data[begin : begin + draw(st.integers(1, 200))]
            case 5:
                del data[place:]
    return bytes(data)


def measured(run: Callable[[bytes], object], data: bytes) -> None:
    """Run a target, and fail if it takes long or much."""
    tracemalloc.start()
    begin = time.monotonic()
    try:
        run(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - begin < SECONDS
    assert peak < OVERHEAD_BYTES + PER_BYTE * len(data)


@each_target
@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_a_changed_checkpoint_is_read_or_refused(name: str, data: st.DataObject) -> None:
    measured(TARGETS[name].run, data.draw(mutated(name)))


@each_target
@given(data=st.binary(max_size=300))
@example(data=b"")
@settings(deadline=None)
def test_bytes_at_random_are_refused(name: str, data: bytes) -> None:
    assert seeds(name)
    measured(TARGETS[name].run, data)


@each_target
def test_a_checkpoint_is_refused_at_every_length_but_its_own(name: str) -> None:
    whole = max(seeds(name), key=len)
    for length in range(0, len(whole), 1 if len(whole) < 3000 else 3):
        TARGETS[name].run(whole[:length])


@st.composite
def headers(draw: st.DrawFn) -> object:
    """JSON that nearly is a header."""
    sizes = st.integers(-1, 9) | st.sampled_from([True, 2.0, None, "3", 1 << 63, 1 << 64])
    entries = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "U8", "BOOL", "F4", "F64", "f32", 3, None]),
            "shape": st.lists(sizes, max_size=3) | sizes,
            "data_offsets": st.lists(sizes, max_size=3) | sizes,
        },
    )
    return draw(st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), entries | st.none(), max_size=4))


@given(header=headers(), size_bytes=st.integers(0, 12))
@settings(deadline=None)
def test_a_header_that_is_accepted_is_accepted_by_the_safetensors_package_too(header: object, size_bytes: int) -> None:
    with folder() as place:
        path = write_raw(place / "a.safetensors", header, bytes(size_bytes))
        try:
            contents = open_checkpoint(path)
        except CheckpointError:
            return
        with safetensors.safe_open(path, "pt") as file:
            assert set(file.keys()) == set(contents.tensors)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_that_is_cut_short_at_any_moment_after_opening_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    for length in range(0, 400, 7):
        safetensors.torch.save_file(small_state(), path) if suffix == "safetensors" else torch.save(small_state(), path)
        contents = open_checkpoint(path)
        filled = [stored for stored in contents.tensors.values() if stored.numel]
        last = max(filled, key=lambda stored: stored.chunks[0].offset)
        os.truncate(path, min(length, last.chunks[0].offset + last.size_bytes - 1))
        with pytest.raises(CheckpointError, match="cut short after it was opened"):
            last.read(0, torch.empty(last.numel, dtype=last.dtype))
