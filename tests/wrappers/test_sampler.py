"""Who takes which samples."""

import random
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from nucleate.wrappers.order_generators import OrderGenerators
from nucleate.wrappers.sampler import NotedSampler, RestSampler, ShareSampler


def shared(source: Sampler[Any], num_replicas: int, rank: int, drop_last: bool = False, agree: Any = None) -> Any:
    return ShareSampler(source, num_replicas, rank, drop_last, generators_of(source), agree)


def generators_of(source: Sampler[Any]) -> OrderGenerators:
    return OrderGenerators(DataLoader(range(100), sampler=source))  # type: ignore[arg-type]


def shares(size: int, world_size: int, drop_last: bool, shuffle: bool = True) -> list[list[int]]:
    source: Sampler[Any] = RandomSampler(range(size)) if shuffle and size else SequentialSampler(range(size))
    generators = generators_of(source)
    samplers = [ShareSampler(source, world_size, rank, drop_last, generators) for rank in range(world_size)]
    drawn = []
    for sampler in samplers:
        torch.default_generator.manual_seed(5)
        drawn.append(list(sampler))
        assert len(sampler) == len(drawn[-1])
    return drawn


@given(size=st.integers(0, 40), world_size=st.integers(1, 7), drop_last=st.booleans(), shuffle=st.booleans())
def test_the_ranks_together_draw_what_one_process_draws(
    size: int, world_size: int, drop_last: bool, shuffle: bool
) -> None:
    torch.default_generator.manual_seed(5)
    alone = list(RandomSampler(range(size)) if shuffle and size else SequentialSampler(range(size)))
    together = [index for step in zip(*shares(size, world_size, drop_last, shuffle), strict=True) for index in step]
    whole = size // world_size * world_size if drop_last else size
    assert together[:whole] == alone[:whole]
    assert sorted(alone) == list(range(size))
    assert len(together) == (whole if drop_last else -(-size // world_size) * world_size)
    assert len(together) - len(alone) < world_size


MAKERS: list[Any] = [
    lambda: RandomSampler(range(10)),
    lambda: RandomSampler(range(10), generator=torch.Generator().manual_seed(3)),
    lambda: RandomSampler(range(10), replacement=True, num_samples=70),
    lambda: SubsetRandomSampler(range(10)),
    lambda: WeightedRandomSampler([1.0] * 10, 10),
    lambda: WeightedRandomSampler([1.0] * 10, 10, generator=torch.Generator().manual_seed(3)),
]


@pytest.mark.parametrize("make", MAKERS)
def test_drawing_leaves_the_generators_as_torchs_sampler_leaves_them(make: Any) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        alone, after = list(make()), torch.get_rng_state()
        torch.manual_seed(seed)
        # Of these two the first is like rank 0; the second gets the states of a rank with another seed.
        assert list(shared(make(), 1, 0)) == alone
        assert torch.equal(torch.get_rng_state(), after)
        other = generators_of(make()).states()
        torch.manual_seed(seed)
        list(shared(make(), 1, 0, agree=lambda _, other=other: other))
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("make", MAKERS)
def test_ranks_that_were_seeded_differently_draw_what_rank_0_draws(make: Any) -> None:
    torch.manual_seed(1)
    first = shared(make(), 2, 0)
    whole = [list(first)]
    torch.manual_seed(2)
    whole.append(list(shared(make(), 2, 1, agree=lambda _: first.start)))
    torch.manual_seed(1)
    assert [index for pair in zip(*whole, strict=True) for index in pair] == list(make())


def test_generators_of_a_users_sampler_are_those_of_rank_0() -> None:
    class Mixed(Sampler[float]):
        """Draws from every generator."""

        def __init__(self, seed: int) -> None:
            self.mine = torch.Generator().manual_seed(seed)

        def __iter__(self) -> Iterator[float]:
            yield from (random.random(), float(numpy.random.rand()))
            yield from (torch.rand(1).item(), torch.rand(1, generator=self.mine).item())

        def __len__(self) -> int:
            return 4

    first = shared(Mixed(1), 1, 0)
    expected = list(first)
    before = [random.getstate(), torch.get_rng_state().tolist()]
    assert list(shared(Mixed(2), 1, 0, agree=lambda _: first.start)) == expected
    assert [random.getstate(), torch.get_rng_state().tolist()] == before


def test_the_states_of_an_order_repeat_it_and_leave_the_present_ones() -> None:
    class Early(Sampler[int]):
        """Draws before its first sample is asked for."""

        def __iter__(self) -> Iterator[int]:
            return iter(torch.randperm(10).tolist())

        def __len__(self) -> int:
            return 10

    for make in (*MAKERS, Early):
        source = make()
        noted = NotedSampler(source, generators_of(source))
        samples = iter(noted)
        torch.rand(1)  # A sampler of torch draws only after that.
        drawn = list(samples)
        state = torch.get_rng_state()
        assert noted.start is not None
        assert list(noted.rest(noted.start, 3)) == drawn[3:]
        sharing = shared(make(), 1, 0)
        sharing.draw_again(noted.start)
        assert list(sharing) == drawn
        assert torch.equal(torch.get_rng_state(), state)


def test_an_endless_sampler_is_shared_as_it_goes() -> None:
    class Endless(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(count())

    assert list(islice(shared(Endless(), 3, 1), 4)) == [1, 4, 7, 10]
    with pytest.raises(TypeError):
        len(shared(Endless(), 3, 1))


def test_a_sampler_that_wants_the_epoch_is_told() -> None:
    class Told(Sampler[int]):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[int]:
            return iter([self.epoch])

        def __len__(self) -> int:
            return 1

    sampler = shared(Told(), 1, 0)
    sampler.set_epoch(4)
    assert list(sampler) == [4]


def test_the_rest_of_an_order_has_a_length() -> None:
    assert list(RestSampler(lambda: iter([3]), lambda: 1)) == [3]
    assert len(RestSampler(lambda: iter([3]), lambda: 1)) == 1
    assert len(RestSampler(lambda: iter([]), lambda: -1)) == 0
