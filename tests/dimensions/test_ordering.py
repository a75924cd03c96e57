"""Dimensions are applied in the order that their `after` gives, whatever order the user wrote."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from nucleate.dimensions import ActivationCheckpointing, Dimension, FullyShard, TensorParallel
from nucleate.dimensions.ordering import ordered
from nucleate.errors import ConfigurationError


class Named(Dimension):
    def __init__(self, name: str, *after: str) -> None:
        self.name = name
        self.after = after

    def apply(self, model: Any, mesh: Any) -> None: ...


def test_outer_dimensions_come_after_inner_ones() -> None:
    given = [FullyShard(), ActivationCheckpointing(), TensorParallel({"a": "colwise"})]
    for permutation in itertools.permutations(given):
        names = [dimension.name for dimension in ordered(permutation)]
        assert names == ["tensor_parallel", "activation_checkpointing", "fully_shard"]


def test_dimensions_that_do_not_know_each_other_keep_the_users_order() -> None:
    for names in (["a", "b", "c"], ["c", "a", "b"]):
        assert [dimension.name for dimension in ordered([Named(name) for name in names])] == names


def test_a_circle_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="'a' comes after 'c' comes after 'b' comes after 'a'"):
        ordered([Named("a", "c"), Named("b", "a"), Named("c", "b"), Named("d", "a")])
    with pytest.raises(ConfigurationError, match="'a' comes after 'a'"):
        ordered([Named("a", "a")])


def test_a_dimension_is_given_once() -> None:
    with pytest.raises(ConfigurationError, match="have fully_shard twice"):
        ordered([FullyShard(), FullyShard(cpu_offload=True)])


def test_a_dimension_says_itself_which_known_ones_wrap_around_it() -> None:
    class Inner(Named):
        before = ("fully_shard", "other")

    for given in ([FullyShard(), Inner("inner")], [Inner("inner"), FullyShard()]):
        assert [dimension.name for dimension in ordered(given)] == ["inner", "fully_shard"]
    with pytest.raises(ConfigurationError, match="'inner' comes after 'other' comes after 'inner'"):
        ordered([Inner("inner", "other"), Named("other")])
