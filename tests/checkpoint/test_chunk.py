"""Chunks that overlap are found, and the search takes few comparisons for the chunks of a mesh."""

from __future__ import annotations

import random

import pytest
import torch

from nucleate.checkpoint.stored import Chunk, HeldBytes, chunk
from nucleate.checkpoint.stored.chunk import meet, overlapping

FILE = HeldBytes("file", torch.zeros(8, dtype=torch.uint8))


def test_overlaps_are_those_that_a_comparison_of_all_pairs_finds() -> None:
    draw = random.Random(0)
    outcomes = set()
    for _ in range(2000):
        boxes = [
            ((draw.randrange(7), draw.randrange(7)), (draw.randrange(4), draw.randrange(1, 4)))
            for _ in range(draw.randrange(1, 7))
        ]
        filled = [box for box in boxes if 0 not in box[1]]
        pairs = [(a, b) for place, a in enumerate(filled) for b in filled[:place] if meet(*a, *b)]
        found = overlapping([Chunk(FILE, 0, begin, shape) for begin, shape in boxes])
        assert (found is None) == (not pairs)
        if found is not None:
            assert meet(found[0].begin, found[0].shape, found[1].begin, found[1].shape)
        outcomes.add(found is None)
    assert outcomes == {False, True}


def test_the_chunks_of_a_mesh_are_hardly_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def counted(*boxes: tuple[int, ...]) -> bool:
        calls.append(boxes)
        return meet(*boxes)

    monkeypatch.setattr(chunk, "meet", counted)
    grid = [Chunk(FILE, 0, (row * 4, column * 4), (4, 4)) for row in range(32) for column in range(32)]
    random.Random(0).shuffle(grid)
    assert overlapping(grid) is None
    assert len(calls) < 2 * len(grid)
    assert overlapping([*grid, Chunk(FILE, 0, (9, 9), (1, 1))]) is not None
