"""A mesh is plain data: ranks, coordinates, and clear errors for sizes that do not fit."""

from __future__ import annotations

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
