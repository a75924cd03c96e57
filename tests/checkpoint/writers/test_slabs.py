"""Boxes end up where they belong in a file."""

from __future__ import annotations

import errno
import itertools
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nucleate.checkpoint.writers.allocation import check_room, create_file, failure, reserve
from nucleate.errors import CheckpointError
from nucleate.layout import runs

pytestmark = pytest.mark.usefixtures("factories_on_device")


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    whole = draw(st.lists(st.integers(1, 5), max_size=4).map(tuple))
    begin = tuple(draw(st.integers(0, length - 1)) for length in whole)
    shape = tuple(draw(st.integers(1, length - first)) for length, first in zip(whole, begin, strict=True))
    return begin, shape, whole


@given(boxes())
def test_runs_are_exactly_the_elements_of_the_box_in_order(
    box: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
) -> None:
    begin, shape, whole = box
    places = torch.arange(math.prod(whole)).view(whole)
    for dim, (first, length) in enumerate(zip(begin, shape, strict=True)):
        places = places.narrow(dim, first, length)
    found = [first + number for first, numel in runs(begin, shape, whole) for number in range(numel)]
    assert found == places.flatten().tolist()


@given(boxes())
def test_runs_are_as_long_as_they_can_be(box: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]) -> None:
    found = list(runs(*box))
    assert all(first + numel < after for (first, numel), (after, _) in itertools.pairwise(found))


def test_a_file_has_its_room_on_disk_before_it_is_written(tmp_path: Path) -> None:
    create_file(tmp_path / "f", 10 << 20, b"head")
    status = (tmp_path / "f").stat()
    assert status.st_size == 10 << 20
    assert status.st_blocks * 512 >= 10 << 20
    assert (tmp_path / "f").read_bytes()[:6] == b"head\0\0"


def test_where_room_cannot_be_reserved_the_file_still_has_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ctypes

    def unsupported(*args: int) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr("nucleate.checkpoint.writers.allocation._fallocate", lambda: unsupported)
    with open(tmp_path / "f", "wb") as file:
        reserve(file.fileno(), 1000)
    assert (tmp_path / "f").stat().st_size == 1000


def test_a_full_disk_is_told_with_what_is_needed_and_what_is_free(tmp_path: Path) -> None:
    message = str(failure(tmp_path / "f", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 123))
    assert "No space left on device. 123 bytes are needed. " in message
    assert " bytes are free. Make room, or save elsewhere." in message


def test_what_cannot_have_room_is_refused(tmp_path: Path) -> None:
    check_room(tmp_path, 1)
    with pytest.raises(CheckpointError, match=f"{1 << 60} bytes are needed"):
        check_room(tmp_path, 1 << 60)
