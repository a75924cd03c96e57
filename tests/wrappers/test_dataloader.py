"""A loader of one rank: its share, its device, its seeds, and where it goes on."""

import io
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from nucleate.errors import ConfigurationError, UsageError
from nucleate.seed import RandomState, derive_seed, seed_everything, seeded
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


class Noisy(Dataset[torch.Tensor]):
    """Samples to which a random augmentation adds noise."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return index + torch.rand(1) + random.random() + float(numpy.random.rand())


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
    ranks = []
    for rank in range(2):
        torch.manual_seed(3)
        ranks.append(batches(prepare(loader(), num_replicas=2, rank=rank)))
    torch.manual_seed(3)
    alone = [batch.tolist() for batch in loader(batch_size=4)]
    assert [sorted(one + other) for one, other in zip(*ranks, strict=True)] == [sorted(batch) for batch in alone]


def test_the_epoch_is_told_to_samplers_that_want_it() -> None:
    sampler = DistributedSampler(Numbers(), num_replicas=2, rank=0)
    wrapper = prepare(DataLoader(Numbers(), sampler=sampler), num_replicas=2)
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


class Lazy(Sampler[int]):
    """Draws each sample when it is asked for, from all global generators."""

    def __iter__(self) -> Iterator[int]:
        for _ in range(20):
            yield (random.randrange(20) + int(numpy.random.randint(20)) + int(torch.randint(20, ()))) % 20

    def __len__(self) -> int:
        return 20


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"shuffle": True},
        lambda: {"shuffle": True, "generator": generator()},
        lambda: {"shuffle": True, "num_workers": 1},
        lambda: {"shuffle": True, "num_workers": 1, "persistent_workers": True, "generator": generator()},
        lambda: {"sampler": Lazy()},
        lambda: {"sampler": WeightedRandomSampler([1.0] * 20, 20, generator=generator()), "batch_size": None},
    ],
)
def test_in_one_process_all_is_as_with_a_plain_loader(options: Any) -> None:
    def run(it: Any) -> list[Any]:
        seen = [(batch.tolist(), torch.rand(1).item()) for _ in range(2) for batch in it]
        one, other = iter(it), iter(it)
        return [*seen, next(other).tolist(), next(one).tolist(), torch.rand(1).item(), random.random()]

    ends = []
    for wrap in (lambda it: it, prepare):
        seed_everything(5)
        ends.append(run(wrap(DataLoader(Noisy(), **{"batch_size": 3, **options()}))))
    assert ends[0] == ends[1]


def test_a_loader_that_splits_already_is_not_split_again() -> None:
    data = Numbers()
    mine = DataLoader(data, 2, sampler=DistributedSampler(data, num_replicas=2, rank=1, shuffle=True))
    wrapper = prepare(mine, num_replicas=2, rank=1)
    assert len(wrapper) == 5
    assert batches(wrapper) != batches(wrapper)


def test_without_the_distributed_sampler_every_rank_sees_everything() -> None:
    ranks = [batches(prepare(loader(), num_replicas=2, rank=rank, use_distributed_sampler=False)) for rank in range(2)]
    assert all(sorted(index for batch in rank for index in batch) == list(range(20)) for rank in ranks)
    assert ranks[0] != ranks[1]  # Each draws from its own generators, which have gone on here.


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
    batches(wrapper)
    for number, _ in enumerate(wrapper):
        if number == 1:
            break
    wrapper.load_state_dict(wrapper.state_dict())
    assert batches(wrapper) == [[4, 5]]


def saved(state: Any) -> Any:
    """Return a state as a file brings it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"shuffle": True},
        lambda: {"shuffle": True, "num_workers": 1, "drop_last": True},
        lambda: {"shuffle": True, "num_workers": 1, "generator": generator()},
        lambda: {"sampler": RandomSampler(Numbers(), True, 90, generator()), "batch_size": 9},
        lambda: {"batch_sampler": BatchSampler(Lazy(), 3, False), "batch_size": 1},
    ],
)
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_a_loader_goes_on_where_its_state_was_saved(options: Any, num_replicas: int) -> None:
    def make() -> DataLoaderWrapper:
        mine = DataLoader(Numbers(), **{"batch_size": 3, **options()})
        return prepare(mine, num_replicas=num_replicas, rank=num_replicas - 1)

    seed_everything(9)
    wrapper = make()
    batches(wrapper)
    iterator = iter(wrapper)
    assert len(list(islice(iterator, 2))) == 2
    state, numbers = saved(wrapper.state_dict()), RandomState().state_dict()
    rest = [batch.tolist() for batch in iterator]
    between = torch.rand(1)
    rest += batches(wrapper)

    seed_everything(10)
    resumed = make()
    resumed.load_state_dict(state)
    RandomState().load_state_dict(numbers)
    again = batches(resumed)
    assert torch.equal(torch.rand(1), between)
    assert again + batches(resumed) == rest
    assert resumed.state_dict()["epoch"] == 3


def test_the_random_state_alone_resumes_at_the_start_of_an_epoch() -> None:
    wrapper = prepare(loader())
    batches(wrapper)
    numbers = RandomState().state_dict()
    expected = batches(wrapper)
    seed_everything(10)
    RandomState().load_state_dict(numbers)
    assert batches(prepare(loader())) == expected


def test_two_loaders_in_step_go_on_too() -> None:
    one, other = prepare(loader()), prepare(loader(batch_size=4))
    pairs = zip(one, other, strict=False)
    next(pairs)
    states = [wrapper.state_dict() for wrapper in (one, other)]
    rest = [(a.tolist(), b.tolist()) for a, b in pairs]
    again = prepare(loader()), prepare(loader(batch_size=4))
    for wrapper, state in zip(again, states, strict=True):
        wrapper.load_state_dict(state)
    assert [(a.tolist(), b.tolist()) for a, b in zip(*again, strict=False)] == rest


def middle(it: DataLoaderWrapper, num_batches: int = 2) -> dict[str, Any]:
    for number, _ in enumerate(it, 1):
        if number == num_batches:
            return it.state_dict()
    raise AssertionError("the loader has ended")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 4}, r"4 samples in a step of all ranks, but .* of a loader with 2, after 2 batches of epoch 0"),
        ({"sampler": range(18), "shuffle": False}, "18 samples in an epoch, but .* of a loader with 20"),
    ],
)
def test_the_state_of_a_loader_with_other_batches_is_refused(options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        prepare(loader(**options)).load_state_dict(middle(prepare(loader())))
    start = prepare(loader()).state_dict()
    prepare(loader(**options)).load_state_dict(start)  # At the start of an epoch nothing is lost.
    with pytest.raises(UsageError, match="not the state of a data loader"):
        prepare(loader()).load_state_dict({"step": 3})


def test_another_number_of_ranks_goes_on_with_the_same_samples() -> None:
    torch.manual_seed(3)
    wrapper = prepare(loader(batch_size=4))
    state = middle(wrapper)
    torch.manual_seed(3)
    rest = [batch.tolist() for batch in DataLoader(Numbers(), 4, shuffle=True)][2:]
    ranks = []
    for rank in range(2):
        resumed = prepare(loader(), num_replicas=2, rank=rank)
        resumed.load_state_dict(state)
        ranks.append(batches(resumed))
    assert [sorted(one + other) for one, other in zip(*ranks, strict=True)] == [sorted(batch) for batch in rest]


def test_a_state_of_an_older_version_is_read() -> None:
    def order() -> list[int]:  # as the older version drew it
        with seeded(derive_seed(9, 1)):
            return list(RandomSampler(Numbers()))

    wrapper = prepare(loader())
    wrapper.load_state_dict({"epoch": 1, "batches": 3, "seed": 9})
    assert [index for batch in batches(wrapper) for index in batch] == order()[6:]
    with pytest.raises(UsageError, match=r"older nucleate, after 3 batches of epoch 1.*set_epoch\(1\)"):
        prepare(loader(generator=generator())).load_state_dict({"epoch": 1, "batches": 3, "seed": 9})


def test_what_was_delivered_is_not_loaded_again() -> None:
    data = Numbers()
    wrapper = prepare(DataLoader(data, batch_size=2))
    wrapper.load_state_dict(middle(prepare(DataLoader(Numbers(), batch_size=2)), 8))
    assert batches(wrapper) == [[16, 17], [18, 19]]
    assert data.loaded == [16, 17, 18, 19]


def test_a_state_saved_at_the_last_batch_goes_on_with_the_next_epoch() -> None:
    wrapper = prepare(loader())
    wrapper.load_state_dict(middle(prepare(loader()), 10))
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
    drawn = next(iter(prepare(mine, num_replicas=2)))
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(2))


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
