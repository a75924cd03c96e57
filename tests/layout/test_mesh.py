"""A mesh is plain data: ranks, coordinates, and clear errors for sizes that do not fit."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from nucleate.errors import ConfigurationError
from nucleate.layout import Mesh


def test_ranks_and_coordinates_lead_to_each_other_row_by_row() -> None:
    mesh = Mesh.over(24, {"dp_replicate": 2, "dp_shard": -1, "tp": 4})
    assert mesh.axes == ("dp_replicate", "dp_shard", "tp")
    assert mesh.sizes == (2, 3, 4)
    assert [mesh.rank_at(mesh.coordinate(rank) or ()) for rank in range(24)] == list(range(24))
    assert mesh.coordinate(13) == (1, 0, 1)
    assert mesh.coordinate(24) is None
    assert str(mesh) == "dp_replicate=2 x dp_shard=3 x tp=4"


def test_a_mesh_may_have_its_ranks_in_another_order_and_only_some_of_them() -> None:
    mesh = Mesh(("tp",), (3,), (5, 1, 3))
    assert [mesh.coordinate(rank) for rank in range(6)] == [None, (1,), None, (2,), None, (0,)]
    assert [mesh.rank_at((place,)) for place in range(3)] == [5, 1, 3]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"dp_shard": 3}, "dp_shard=3 does not fit 8 ranks"),
        ({"dp_shard": 3, "tp": -1}, "dp_shard=3 x tp=-1 does not fit 8 ranks"),
        ({"dp_shard": -1, "tp": -1}, "dp_shard=-1, tp=-1"),
        ({"dp_shard": 0}, "dp_shard=0"),
        ({"dp_shard": 2.0, "tp": 4}, r"dp_shard=2\.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Mesh.over(8, sizes)


def test_equal_meshes_are_one_mesh() -> None:
    assert Mesh.over(4, {"dp_shard": -1}) == Mesh.over(4, {"dp_shard": 4})
    assert len({Mesh.over(4, {"dp_shard": -1}), Mesh.over(4, {"dp_shard": 4}), Mesh.over(4, {"tp": 4})}) == 2


def test_a_mesh_may_be_open_until_the_number_of_ranks_is_known() -> None:
    mesh = Mesh.of({"dp_replicate": 2, "dp_shard": -1, "tp": 4})
    assert mesh.fitted(1024).sizes == (2, 128, 4)
    assert mesh.fitted(8).sizes == (2, 1, 4)
    assert mesh.sizes == (2, -1, 4)
    for world_size in (4, 12):
        with pytest.raises(ConfigurationError, match=rf"does not fit {world_size} ranks.*a multiple of 8 processes"):
            mesh.fitted(world_size)


def test_a_place_along_several_axes_counts_them_together() -> None:
    mesh = Mesh.of({"dp_replicate": 2, "dp_shard": 3, "tp": 2})
    assert [mesh.place(rank, ("dp_replicate", "dp_shard")) for rank in range(0, 12, 2)] == [(n, 6) for n in range(6)]
    assert [mesh.place(rank, ("tp",)) for rank in (0, 1, 11)] == [(0, 2), (1, 2), (1, 2)]
    assert mesh.place(7, ("cp",)) == (0, 1)
    assert (mesh.size_of("tp"), mesh.size_of("cp")) == (2, 1)


@pytest.mark.parametrize("sizes", [{}, {"": 2}, {"dp shard": 2}, {3: 2}])
def test_axes_need_names(sizes: Any) -> None:
    with pytest.raises(ConfigurationError, match="a name for each axis"):
        Mesh.of(sizes)


def test_a_mesh_travels_without_its_groups() -> None:
    mesh = Mesh.of({"tp": 2})
    mesh._device_meshes["cpu"] = object()
    assert pickle.loads(pickle.dumps(mesh)) == mesh
    assert not pickle.loads(pickle.dumps(mesh))._device_meshes
