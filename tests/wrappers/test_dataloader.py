"""A loader of one rank: its share, its device, its seeds, and where it goes on."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, SequentialSampler

from nucleate.errors import ConfigurationError, UsageError
from nucleate.wrappers.dataloader import DataLoaderWrapper, move, prepare
from tests.device import device


class Numbers(Dataset[int]):
    def __init__(self, size: int = 20) -> None:
        self.size = size
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        self.loaded.append(index)
        return index


class Noise(Dataset[torch.Tensor]):
    """What a random augmentation in a worker draws."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(2)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(6))


class MyLoader(DataLoader[Any]):
    pass


def batches(wrapper: DataLoaderWrapper) -> list[list[int]]:
    return [batch.tolist() for batch in wrapper]


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Numbers(), **{"batch_size": 2, "shuffle": True, **options})


def test_the_batches_of_a_step_are_those_of_one_process_with_a_larger_batch() -> None:
    ranks = [batches(prepare(loader(), num_replicas=2, rank=rank, seed=3)) for rank in range(2)]
    alone = batches(prepare(loader(batch_size=4), seed=3))
    assert [sorted(one + other) for one, other in zip(*ranks, strict=True)] == [sorted(batch) for batch in alone]


def test_each_iteration_is_the_next_epoch() -> None:
    wrapper = prepare(loader(), seed=3)
    first, second = batches(wrapper), batches(wrapper)
    assert first != second
    wrapper.set_epoch(0)
    assert batches(wrapper) == first


def test_class_and_options_are_kept_and_the_users_loader_is_not_changed() -> None:
    collate = lambda samples: samples  # noqa: E731
    mine = MyLoader(Numbers(), batch_size=3, collate_fn=collate, drop_last=True)
    sampler = mine.sampler
    wrapper = prepare(mine, num_replicas=2, rank=1)
    assert type(wrapper.loader) is MyLoader
    assert wrapper.collate_fn is collate
    assert wrapper.batch_size == 3
    assert wrapper.drop_last
    assert len(wrapper) == 3
    assert next(iter(wrapper)) == [1, 3, 5]
    assert mine.sampler is sampler
    assert mine.generator is None


def test_iterating_takes_nothing_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    batches(prepare(loader()))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loader_that_splits_already_is_not_split_again() -> None:
    data = Numbers()
    mine = DataLoader(data, 2, sampler=DistributedSampler(data, num_replicas=2, rank=1, shuffle=True))
    wrapper = prepare(mine, num_replicas=2, rank=1)
    assert len(wrapper) == 5
    assert batches(wrapper) != batches(wrapper)


def test_without_the_distributed_sampler_every_rank_sees_everything() -> None:
    ranks = [batches(prepare(loader(), num_replicas=2, rank=rank, use_distributed_sampler=False)) for rank in range(2)]
    assert all(sorted(index for batch in rank for index in batch) == list(range(20)) for rank in ranks)
    assert ranks[0] != ranks[1]


def test_a_batch_sampler_of_torch_is_made_anew_over_the_share() -> None:
    mine = DataLoader(Numbers(), batch_sampler=BatchSampler(SequentialSampler(range(20)), 3, drop_last=True))
    assert batches(prepare(mine, num_replicas=2, rank=1)) == [[1, 3, 5], [7, 9, 11], [13, 15, 17]]


def test_batches_of_the_users_own_sampler_are_shared_as_they_are() -> None:
    mine = DataLoader(Numbers(), batch_sampler=[[0, 1, 2], [3], [4, 5], [6]])
    assert batches(prepare(mine, num_replicas=2, rank=1)) == [[3], [6]]


def test_samples_without_batches_are_shared_too() -> None:
    mine = DataLoader(Numbers(6), batch_size=None)
    assert list(prepare(mine, num_replicas=2, rank=1)) == [1, 3, 5]


def test_a_dataset_that_is_iterated_over_is_left_as_it_is() -> None:
    wrapper = prepare(DataLoader(Stream(), batch_size=2), num_replicas=2, rank=1)
    assert batches(wrapper) == [[0, 1], [2, 3], [4, 5]]
    wrapper.load_state_dict({"epoch": 1, "batches": 2, "seed": 0})
    assert batches(wrapper) == [[4, 5]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_goes_on_where_its_state_was_saved(num_workers: int) -> None:
    options = {"num_workers": num_workers, "drop_last": True, "batch_size": 3}
    wrapper = prepare(loader(**options), num_replicas=2, rank=1, seed=9)
    batches(wrapper)
    iterator = iter(wrapper)
    seen = [batch.tolist() for batch in islice(iterator, 2)]
    state = wrapper.state_dict()
    assert state == {"epoch": 1, "batches": 2, "seed": 9}
    rest = [batch.tolist() for batch in iterator] + batches(wrapper)
    resumed = prepare(loader(**options), num_replicas=2, rank=1, seed=9)
    resumed.load_state_dict(state)
    assert batches(resumed) + batches(resumed) == rest
    assert seen
    assert resumed.state_dict() == {"epoch": 3, "batches": 0, "seed": 9}


def test_the_state_of_a_loader_with_another_order_is_refused() -> None:
    state = prepare(loader(), seed=3).state_dict()
    with pytest.raises(UsageError, match=r"follows from seed 4.*seed_everything\(3\)"):
        prepare(loader(), seed=4).load_state_dict(state)


def test_what_was_delivered_is_not_loaded_again() -> None:
    data = Numbers()
    wrapper = prepare(DataLoader(data, batch_size=2))
    wrapper.load_state_dict({"epoch": 0, "batches": 8, "seed": 0})
    assert batches(wrapper) == [[16, 17], [18, 19]]
    assert data.loaded == [16, 17, 18, 19]


def test_a_state_saved_at_the_last_batch_goes_on_with_the_next_epoch() -> None:
    wrapper = prepare(loader())
    wrapper.load_state_dict({"epoch": 0, "batches": 10, "seed": 0})
    assert batches(wrapper) == []
    assert len(batches(wrapper)) == 10


def test_workers_draw_other_numbers_on_every_rank_worker_and_epoch() -> None:
    generators = [None, torch.Generator().manual_seed(0)]
    for generator in generators:
        drawn = []
        for rank in range(2):
            mine = DataLoader(Noise(), batch_size=None, num_workers=2, generator=generator)
            wrapper = prepare(mine, num_replicas=2, rank=rank)
            for _ in range(2):
                drawn += [tuple(noise.tolist()) for noise in wrapper]
        assert len(set(drawn)) == len(drawn) == 8


def test_the_users_worker_init_still_runs() -> None:
    mine = DataLoader(Noise(), batch_size=None, num_workers=1, worker_init_fn=lambda _: torch.manual_seed(0))
    torch.manual_seed(0)
    assert torch.equal(next(iter(prepare(mine))), torch.rand(2))


def test_batches_are_put_on_the_device() -> None:
    for where in (torch.device("meta"), device()):
        wrapper = prepare(loader(), device=where)
        assert next(iter(wrapper)).device == where
    moved = move({"a": [torch.ones(1)], "packed": pack_sequence([torch.ones(1)]), "text": "b"}, device())
    assert isinstance(moved["packed"], PackedSequence)
    assert moved["a"][0].device == moved["packed"].data.device == device()
    assert moved["a"][0].item() == moved["packed"].data.item() == 1
    assert moved["text"] == "b"


def test_only_a_loader_that_is_not_set_up_yet_is_taken() -> None:
    with pytest.raises(UsageError, match="set up already"):
        prepare(prepare(loader()))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not list"):
        prepare([1, 2])  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="rank 2 of 2"):
        prepare(loader(), num_replicas=2, rank=2)
