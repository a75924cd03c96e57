"""A layout answers who holds and who writes what by arithmetic, for any number of ranks in one process."""

from __future__ import annotations

import math
import time
from collections import Counter

import pytest
import torch

from nucleate.errors import UsageError
from nucleate.layout import Box, Layout, Mesh, Replicate, Shard, TensorLayout


def tensor(shape: tuple[int, ...], mesh: Mesh, *placements: Replicate | Shard, **facts: object) -> TensorLayout:
    return TensorLayout(torch.float32, shape, mesh, placements, is_plain=False, **facts)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def large() -> Layout:
    mesh = Mesh.over(4096, {"dp_replicate": 8, "dp_shard": -1, "tp": 8})
    tensors = {}
    for layer in range(16):
        tensors[f"{layer}.up"] = tensor((4096, 1024), mesh, Replicate(), Shard(0, 8), Shard(0))
        tensors[f"{layer}.down"] = tensor((1024, 4096), mesh, Replicate(), Shard(0), Shard(1))
        tensors[f"{layer}.norm"] = tensor((1000,), mesh, Replicate(), Shard(0), Replicate())
    return Layout(tensors, 4096)


def test_it_is_right_for_4096_ranks_in_one_process_in_no_time(large: Layout) -> None:
    start = time.perf_counter()
    counts = torch.zeros(4096, 1024, dtype=torch.int64)
    for rank in range(4096):
        for box in large.boxes("3.up", rank):
            box.of_whole(counts).add_(1)
    assert (counts == 8).all()
    box = large.boxes("3.up", 4095)[0]
    # The last of 64 parts of the last eighth.
    assert (box.begin, box.size) == ((7 * 512 + 63 * 8, 0), (8, 1024))
    assert large.holders("3.up", box) == tuple(4095 - 512 * number for number in reversed(range(8)))
    assert time.perf_counter() - start < 30


def test_every_box_has_one_writer_which_holds_it_and_the_bytes_are_spread(large: Layout) -> None:
    written = Counter[int]()
    for fqn in large:
        for rank in range(0, 512):
            for box in large.boxes(fqn, rank):
                holders = large.holders(fqn, box)
                if rank == holders[0]:
                    writer = large.writer(fqn, box)
                    assert writer in holders
                    written[writer] += box.numel
    total = sum(math.prod(large[fqn].shape) for fqn in large)
    assert sum(written.values()) == total
    # Within an eighth of the mean: the groups of one tensor differ by what does not divide.
    assert max(written.values()) < 1.3 * total / 4096


def test_plain_tensors_are_written_by_the_lowest_rank_and_count_on_every_one() -> None:
    mesh = Mesh(("world",), (4,))
    layout = Layout({"a": TensorLayout(torch.float32, (3, 2), mesh, (Replicate(),), trains=True)}, 4)
    (box,) = layout.boxes("a", 2)
    assert (box.begin, box.size) == ((0, 0), (3, 2))
    assert layout.holders("a", box) == (0, 1, 2, 3)
    assert layout.writer("a", box) == 0
    assert layout.local_bytes(3) == 24
    assert layout.trained == ("a",)


def test_tied_tensors_count_once_and_have_one_writer() -> None:
    mesh = Mesh.over(4, {"dp_replicate": 2, "dp_shard": 2})
    layout = Layout(
        {
            "embed": tensor((8, 2), mesh, Replicate(), Shard(0), tied_with=("head",)),
            "head": tensor((8, 2), mesh, Replicate(), Shard(0), tied_with=("embed",)),
            "up": tensor((8, 2), mesh, Replicate(), Shard(0)),
        },
        4,
    )
    assert layout.local_bytes(1) == 2 * 4 * 2 * 4
    writers = {fqn: layout.writer(fqn, layout.boxes(fqn, 1)[0]) for fqn in layout}
    assert writers["embed"] == writers["head"] != writers["up"]
    assert str(layout).count("\n") == 3
    assert "embed = head" in str(layout)


def test_names_and_boxes_that_are_not_there_are_errors() -> None:
    layout = Layout({"a": tensor((8,), Mesh.over(2, {"dp_shard": 2}), Shard(0))}, 2)
    with pytest.raises(UsageError, match="no tensor 'b'. It has a"):
        layout.boxes("b", 0)
    with pytest.raises(UsageError, match="no rank holds the box"):
        layout.holders("a", Box((1,), (4,), (0,)))


def test_the_table_reads_well() -> None:
    mesh = Mesh.over(2, {"dp_shard": 2})
    layout = Layout(
        {
            "up.weight": tensor((5, 4), mesh, Shard(0), trains=True),
            "codes": TensorLayout(torch.uint8, (4,), mesh, (Replicate(),), converted=True),
            "table": TensorLayout(torch.float64, (2,), mesh, (Replicate(),), is_buffer=True),
        },
        2,
    )
    assert str(layout).splitlines() == [
        "3 tensors on dp_shard=2: 0.0 MiB in all, 0.0 MiB on rank 0",
        "name       dtype              shape   placements             trains  bytes on rank 0",
        "up.weight  float32            [5, 4]  dp_shard: shard dim 0  yes     48",
        "codes      uint8 (converted)  [4]     whole                  no      4",
        "table      float64            [2]     whole                  buffer  16",
    ]
