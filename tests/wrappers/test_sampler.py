"""Who takes which samples."""

from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import RandomSampler, Sampler, SequentialSampler, WeightedRandomSampler

from nucleate.wrappers.sampler import ShareSampler, SkipSampler


def shares(size: int, world_size: int, drop_last: bool, shuffle: bool = True, epoch: int = 0) -> list[list[int]]:
    source: Sampler[Any] = RandomSampler(range(size)) if shuffle and size else SequentialSampler(range(size))
    samplers = [ShareSampler(source, world_size, rank, 5, drop_last) for rank in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
        assert len(sampler) == len(list(sampler))
    return [list(sampler) for sampler in samplers]


@given(size=st.integers(0, 40), world_size=st.integers(1, 7), drop_last=st.booleans(), shuffle=st.booleans())
def test_the_ranks_together_draw_what_one_process_draws(
    size: int, world_size: int, drop_last: bool, shuffle: bool
) -> None:
    (alone,) = shares(size, 1, drop_last, shuffle)
    together = [index for step in zip(*shares(size, world_size, drop_last, shuffle), strict=True) for index in step]
    whole = size // world_size * world_size if drop_last else size
    assert together[:whole] == alone[:whole]
    assert sorted(alone) == list(range(size))
    assert len(together) == (whole if drop_last else -(-size // world_size) * world_size)
    assert len(together) - len(alone) < world_size


def test_each_epoch_has_an_order_of_its_own_and_the_same_one_again() -> None:
    assert shares(20, 2, False, epoch=1) != shares(20, 2, False, epoch=2)
    assert shares(20, 2, False, epoch=1) == shares(20, 2, False, epoch=1)


def test_drawing_takes_nothing_from_the_global_generators() -> None:
    state = torch.get_rng_state()
    shares(20, 2, False)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightedRandomSampler([1.0] * 10, 10),
        lambda: WeightedRandomSampler([1.0] * 10, 10, generator=torch.Generator().manual_seed(torch.seed() % 1000)),
        lambda: RandomSampler(range(10), generator=torch.Generator()),
        lambda: RandomSampler(range(10), replacement=True, num_samples=17),
    ],
)
def test_random_samplers_agree_between_ranks_that_were_seeded_differently(make: Any) -> None:
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        drawn.append(list(ShareSampler(make(), 1, 0, 5, False)))
    assert drawn[0] == drawn[1]


def test_an_endless_sampler_is_shared_as_it_goes() -> None:
    class Endless(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(count())

    assert list(islice(ShareSampler(Endless(), 3, 1, 0, False), 4)) == [1, 4, 7, 10]
    with pytest.raises(TypeError):
        len(ShareSampler(Endless(), 3, 1, 0, False))


def test_a_sampler_that_wants_the_epoch_is_told() -> None:
    class Told(Sampler[int]):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Iterator[int]:
            return iter([self.epoch])

        def __len__(self) -> int:
            return 1

    sampler = ShareSampler(Told(), 1, 0, 0, False)
    sampler.set_epoch(4)
    assert list(sampler) == [4]


def test_skipping_leaves_out_the_first() -> None:
    sampler = SkipSampler([1, 2, 3], 2)
    assert list(sampler) == [3]
    assert len(sampler) == 1
    assert len(SkipSampler([1], 2)) == 0
