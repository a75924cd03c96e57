"""`Parallel` holds its mesh and its dimensions against each other, and answers for any number of ranks."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

from nucleate import Runtime
from nucleate.dimensions import ActivationCheckpointing, Compile, FullyShard, Replicate, TensorParallel
from nucleate.errors import ConfigurationError, PluginNotFoundError
from nucleate.layout import Box, Mesh
from nucleate.strategies import Parallel

PLAN = {"0": "colwise", "2": "rowwise"}


def test_a_runtime_for_many_ranks_is_made_asked_and_printed_in_one_process() -> None:
    strategy = Parallel(
        mesh={"dp_replicate": 2, "dp_shard": -1, "tp": 8}, dimensions=[FullyShard(), TensorParallel(PLAN)]
    )
    assert strategy.mesh_for(1024).sizes == (2, 64, 8)
    assert repr(strategy) == "Parallel(dp_replicate=2 x dp_shard=-1 x tp=8, TensorParallel(2 patterns), FullyShard())"
    runtime = Runtime(accelerator="cpu", strategy=strategy)
    assert "parallel" in repr(runtime)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    layout = strategy.planned_layout(model, 1024)
    assert layout is not None
    assert layout["0.weight"].local_shape(0) == (1, 64)  # 256 rows over 8 x 64 ranks: some are empty.
    assert sum(layout["0.weight"].local_bytes(rank) for rank in range(1024)) == 2 * 256 * 64 * 4
    # The second replica holds what the first one holds; 512 ranks are between them.
    assert layout.boxes("2.weight", 9) == layout.boxes("2.weight", 521) == (Box((1, 32), (1, 32), (0, 0)),)
    assert layout.holders("2.weight", layout.boxes("2.weight", 9)[0]) == (9, 521)


@pytest.mark.parametrize(
    ("mesh", "dimensions", "message"),
    [
        ({"dp_shard": 2}, [TensorParallel(PLAN)], "needs the axis 'tp', and the mesh has the axes dp_shard"),
        ({"dp_shard": 2, "tp": 2}, [FullyShard()], r"no dimension uses the axis tp .*TensorParallel\(plan\)"),
        ({"dp_replicate": 2, "dp_shard": 2}, [Replicate()], "no dimension uses the axis dp_shard"),
        ({"dp_replicate": 2, "dp_shard": 2}, [Replicate(), FullyShard()], "all average gradients over the data axes"),
        ({"tp": 2}, [TensorParallel(PLAN), Compile()], "does not work beside tensor_parallel"),
        ({"dp_shard": -1, "tp": -1}, [FullyShard(), TensorParallel(PLAN)], "one of them may be -1"),
        ([2, 2], [FullyShard()], "must give each axis its size"),
    ],
)
def test_a_mesh_and_dimensions_that_do_not_belong_together_are_refused(
    mesh: Any, dimensions: list[Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Parallel(mesh=mesh, dimensions=dimensions)


def test_names_stand_for_dimensions() -> None:
    strategy = Parallel(mesh={"dp_shard": -1}, dimensions=["activation_checkpointing", "fully_shard"])
    assert [type(dimension) for dimension in strategy.dimensions] == [ActivationCheckpointing, FullyShard]
    with pytest.raises(PluginNotFoundError, match="no dimension plugin named 'fully_shards'"):
        Parallel(mesh={"dp_shard": -1}, dimensions=["fully_shards"])


def test_an_axis_of_one_rank_needs_no_dimension() -> None:
    strategy = Parallel(mesh={"dp_replicate": 1, "dp_shard": -1, "tp": 1}, dimensions=[FullyShard()])
    assert strategy.mesh_for(4).sizes == (1, 4, 1)


def test_a_mesh_is_held_against_the_ranks_when_they_start() -> None:
    strategy = Parallel(mesh=Mesh.of({"tp": 2}), dimensions=[TensorParallel(PLAN)])
    runtime = Runtime(accelerator="cpu", strategy=strategy)
    with pytest.raises(ConfigurationError, match="the mesh tp=2 does not fit 1 ranks"):
        runtime.launch()


def test_a_strategy_travels_to_other_processes() -> None:
    strategy = Parallel(mesh={"dp_shard": -1}, dimensions=[FullyShard(), ActivationCheckpointing()])
    assert repr(pickle.loads(pickle.dumps(strategy))) == repr(strategy)
