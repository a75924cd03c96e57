"""The data of several ranks: the order of one process, wherever the ranks' generators stand."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from nucleate import RandomState, Runtime
from nucleate.errors import RankDisagreementError, UsageError

# Samplers draw on the CPU.
torch.set_default_device("cpu")
runtime = Runtime(accelerator="cpu", strategy="ddp")
runtime.launch()
rank, world_size = runtime.global_rank, runtime.world_size


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> int:
        return index


class Noise(Numbers):
    """Random augmentations in a worker."""

    def __getitem__(self, index: int) -> Any:
        return torch.rand(2)


class Shuffled(IterableDataset[float]):
    """A stream that shuffles in a buffer, from the global generator."""

    def __init__(self, size: int = 14) -> None:
        self.size = size

    def __iter__(self) -> Iterator[float]:
        for begin in range(0, self.size, 7):
            yield from (begin + number for number in torch.randperm(min(7, self.size - begin)).tolist())


def batches(loader: Any) -> list[list[float]]:
    return [batch.tolist() for batch in loader]


def gathered(mine: list[list[float]]) -> list[list[float]]:
    """Return the batches of all ranks, step by step."""
    every: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(every, mine)
    assert len({len(one) for one in every}) == 1, "some ranks have more batches"
    return [sorted(number for batch in step for number in batch) for step in zip(*every, strict=True)]


def alone(seed: int, **options: Any) -> list[list[float]]:
    torch.manual_seed(seed)
    return [sorted(batch) for batch in batches(DataLoader(Numbers(), 4, **options))]


def make(**options: Any) -> Any:
    return runtime.setup_dataloaders(DataLoader(Numbers(), 4 // world_size, **options))


def ranks_have_the_batches_of_one_process() -> None:
    for workers in (0, 2):
        loader = make(shuffle=True, num_workers=workers)
        torch.manual_seed(5 + rank)  # Rank 0 decides, and seeding after setup_dataloaders is enough.
        assert gathered(batches(loader)) == alone(5, shuffle=True)
    loader = make(shuffle=True, generator=torch.Generator().manual_seed(8 + rank))
    plain = DataLoader(Numbers(), 4, shuffle=True, generator=torch.Generator().manual_seed(8))
    for _ in range(2):
        assert gathered(batches(loader)) == [sorted(batch) for batch in batches(plain)]
    # The ranks' own streams go on as with a plain loader.
    torch.manual_seed(5 + rank)
    batches(make(shuffle=True))
    after = torch.get_rng_state()
    torch.manual_seed(5 + rank)
    batches(DataLoader(Numbers(), 4, shuffle=True))
    assert torch.equal(after, torch.get_rng_state())


def a_run_is_resumed_in_the_middle_of_an_epoch() -> None:
    path = runtime.broadcast(tempfile.mkdtemp()) + "/last"
    torch.manual_seed(rank)
    loader = make(shuffle=True, num_workers=2)
    batches(loader)
    iterator = iter(loader)
    next(iterator)
    runtime.save(path, {"loader": loader, "random": RandomState()})
    rest = batches(iterator) + batches(loader)
    torch.manual_seed(100 + rank)
    again = make(shuffle=True, num_workers=2)
    runtime.load(path, {"loader": again, "random": RandomState()})
    assert batches(again) + batches(again) == rest
    # Where each rank draws for itself, each has its own state.
    split = DataLoader(Numbers(), 4, shuffle=True)
    mine = runtime.setup_dataloaders(split, use_distributed_sampler=False)
    iterator = iter(mine)
    next(iterator)
    state, rest = mine.state_dict(), batches(iterator)
    assert gathered(rest)
    assert sorted(state["start"]) == [f"rank_{number}" for number in range(world_size)]
    other = runtime.setup_dataloaders(split, use_distributed_sampler=False)
    other.load_state_dict(state)
    assert batches(other) == rest
    with pytest.raises(UsageError, match="another number of ranks"):
        other.load_state_dict({**state, "start": {"rank_0": state["start"]["rank_0"]}})


def workers_differ_by_rank() -> None:
    for options in ({"shuffle": True}, {}):
        torch.manual_seed(3)
        loader = runtime.setup_dataloaders(DataLoader(Noise(), None, num_workers=2, **options))
        drawn = [noise.tolist() for _ in range(2) for noise in loader]
        every: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(every, drawn)
        assert len({tuple(noise) for one in every for noise in one}) == 2 * 24


def streams_are_dealt_out_when_asked() -> None:
    for workers in (0, 1):
        torch.manual_seed(4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loader = runtime.setup_dataloaders(DataLoader(Shuffled(), 2, num_workers=workers))
            runtime.setup_dataloaders(DataLoader(Shuffled(), 2), split_iterable=False)
            dealt = runtime.setup_dataloaders(DataLoader(Shuffled(), 2, num_workers=workers), split_iterable=True)
        found = [str(one.message) for one in caught if "IterableDataset" in str(one.message)]
        assert len(found) == (rank == 0)
        assert all("Shuffled is an IterableDataset" in text and "split_iterable=True" in text for text in found)
        assert sorted(chain(*batches(loader))) == list(range(14))
        for size in (14, 15):
            torch.manual_seed(4 + rank)  # Ranks that draw other numbers still share one stream.
            dealt.dataset.source.size = size
            mine = []
            for batch in dealt:
                mine.append(batch.tolist())
                torch.rand(1 + rank)
            together = list(chain(*gathered(mine)))
            assert sorted(set(together)) == list(range(size))
            assert len(together) == -(-size // world_size) * world_size
            assert dealt.dataset.size == size
        iterator = iter(dealt)
        next(iterator)
        state, rest = dealt.state_dict(), batches(iterator)
        torch.manual_seed(50 + rank)
        dealt.load_state_dict(state)
        assert batches(dealt) == rest
    dropped = runtime.setup_dataloaders(DataLoader(Shuffled(15), 1, drop_last=True), split_iterable=True)
    assert len(list(chain(*gathered(batches(dropped))))) == 15 // world_size * world_size


def a_loop_on_one_rank_is_named() -> None:
    loader, plain = make(shuffle=True), make()
    if rank == 0:
        batches(plain)  # Nothing random: nothing is exchanged.
    call = partial(batches, loader) if rank == 0 else partial(runtime.broadcast, 1)
    with pytest.raises(RankDisagreementError, match="the start of an epoch of a data loader"):
        call()


ranks_have_the_batches_of_one_process()
a_run_is_resumed_in_the_middle_of_an_epoch()
workers_differ_by_rank()
streams_are_dealt_out_when_asked()
a_loop_on_one_rank_is_named()
print("in order", flush=True)
