"""A name with plus signs says a mesh."""

from __future__ import annotations

import pytest

from nucleate.errors import ConfigurationError, PluginNotFoundError
from nucleate.strategies import FSDPStrategy
from nucleate.strategies.choice import choose


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("fsdp+tp=2", "Parallel(dp_shard=-1 x tp=2, TensorParallel('auto'), FullyShard())"),
        ("tp=4+fsdp", "Parallel(dp_shard=-1 x tp=4, TensorParallel('auto'), FullyShard())"),
        ("FSDP+TP=2", "Parallel(dp_shard=-1 x tp=2, TensorParallel('auto'), FullyShard())"),
        ("ddp+tp=2", "Parallel(dp_replicate=-1 x tp=2, TensorParallel('auto'), Replicate())"),
        ("tp", "Parallel(tp=-1, TensorParallel('auto'))"),
        (
            "hsdp+dp_replicate=2+tp=2",
            "Parallel(dp_replicate=2 x dp_shard=-1 x tp=2, TensorParallel('auto'), FullyShard())",
        ),
        ("fsdp+compile", "Parallel(dp_shard=-1, Compile(), FullyShard())"),
    ],
)
def test_parts_of_a_name_are_axes_and_dimensions(name: str, shown: str) -> None:
    strategy = choose(name, 8)
    assert repr(strategy) == shown
    assert strategy.name == name.lower()


@pytest.mark.parametrize(
    ("name", "part"), [("fsdp+tb=2", "tb=2"), ("fsdp+compil", "compil"), ("fsdp+tp=two", "tp=two")]
)
def test_a_typo_is_refused_with_the_words_that_exist(name: str, part: str) -> None:
    with pytest.raises(PluginNotFoundError, match=f"has the part '{part}', which is unknown. Parts: fsdp, hsdp, ddp"):
        choose(name, 8)


def test_hsdp_needs_the_number_of_replicas_beside_other_axes() -> None:
    with pytest.raises(ConfigurationError, match="hsdp\\+dp_replicate=2"):
        choose("hsdp+tp=2", 8)
    assert isinstance(choose("hsdp", 8), FSDPStrategy)
