"""torchdata's `StatefulDataLoader` keeps its order, and goes on exactly, on one rank and on several."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from nucleate.seed import RandomState, seed_everything
from nucleate.wrappers.dataloader import DataLoaderWrapper, prepare


class Counted(IterableDataset[int]):
    """A stream that knows where it is, so that nothing has to be skipped."""

    def __init__(self) -> None:
        self.position = 0
        self.num_loaded = 0

    def __iter__(self) -> Iterator[int]:
        while self.position < 20:
            self.position += 1
            self.num_loaded += 1
            yield self.position
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


# Under CI it has to be there.
if "CI" not in os.environ:
    pytest.importorskip("torchdata")

# torchdata 0.11 calls functions that torch 2.13 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:")


def stateful(*args: Any, **options: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(*args, **options)


def batches(loader: Any) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def saved(state: Any) -> Any:
    """Return a state as a file brings it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("has_generator", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_order_is_that_of_the_plain_loader(num_workers: int, has_generator: bool) -> None:
    def order(size: int, **place: int) -> list[list[int]]:
        seed_everything(5)
        generator = torch.Generator().manual_seed(2) if has_generator else None
        mine = stateful(range(24), size, True, num_workers=num_workers, generator=generator)
        loader = prepare(mine, **place) if place else mine
        return [*batches(loader), *batches(loader), [int(torch.randint(1000, ()))]]

    plain = order(4)
    assert order(4, num_replicas=1) == plain
    ranks = [order(2, num_replicas=2, rank=rank) for rank in range(2)]
    assert [sorted({*one, *other}) for one, other in zip(*ranks, strict=True)] == [sorted(batch) for batch in plain]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("data", [range(24), Counted])
def test_it_goes_on_exactly(data: Any, num_replicas: int, num_workers: int) -> None:
    def make() -> DataLoaderWrapper:
        is_stream = data is Counted
        mine = stateful(data() if is_stream else data, 3, None if is_stream else True, num_workers=num_workers)
        return prepare(mine, num_replicas=num_replicas, rank=num_replicas - 1)

    seed_everything(9)
    wrapper = make()
    batches(wrapper)
    iterator = iter(wrapper)
    assert len(list(islice(iterator, 2))) == 2
    state, numbers = saved(wrapper.state_dict()), RandomState().state_dict()
    rest = batches(iterator) + batches(wrapper)
    seed_everything(10)
    resumed = make()
    resumed.load_state_dict(state)
    RandomState().load_state_dict(numbers)
    again = batches(resumed)
    if data is Counted and not num_workers:
        assert resumed.dataset.num_loaded == 14
    assert again + batches(resumed) == rest
