"""On several ranks: the results of all samples, each once, in the sampler's order."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, SequentialSampler

from nucleate import Runtime
from nucleate.errors import RankDisagreementError, UsageError
from tests.multi.device import accelerator

# Samplers draw on the CPU; the loaders move the batches to the device.
torch.set_default_device("cpu")
runtime = Runtime(accelerator=accelerator(), strategy="ddp")
runtime.launch()
rank, world_size = runtime.global_rank, runtime.world_size
SIZES = (297, 296, 8, 1)
Pair = namedtuple("Pair", "x y")


class Numbers(Dataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(rank, 10, world_size))


def loader_of(size: int, **options: Any) -> Any:
    with torch.device("cpu"):
        return runtime.setup_dataloaders(DataLoader(Numbers(size), **{"batch_size": 8, **options}))


def gathered(loader: Any, **options: Any) -> list[int]:
    return [sample for batch in loader for sample in runtime.gather_for_metrics(batch, **options).tolist()]


def samples_come_once_and_in_order() -> None:
    for size in SIZES:
        assert gathered(loader_of(size)) == list(range(size))
        torch.manual_seed(size + rank)  # Rank 0 decides.
        shuffled = gathered(loader_of(size, shuffle=True))
        torch.manual_seed(size)
        with torch.device("cpu"):
            alone = DataLoader(Numbers(size), batch_size=8, shuffle=True)
            assert shuffled == [sample for batch in alone for sample in batch.tolist()]
        assert len(gathered(loader_of(size, drop_last=True))) == size // world_size // 8 * 8 * world_size


def results_of_an_epoch_may_be_gathered_at_its_end() -> None:
    for size in SIZES:
        loader = loader_of(size)
        assert runtime.gather_for_metrics(torch.cat(list(loader))).tolist() == list(range(size))
    loader = loader_of(297)
    batch = torch.empty(0)
    for number, delivered in enumerate(loader):
        batch = delivered
        if number == 2:
            break
    assert runtime.gather_for_metrics(batch).tolist() == list(range(16 * world_size, 24 * world_size))
    # A resumed epoch goes on after the samples of the first part.
    rest = runtime.gather_for_metrics(torch.cat(resumed(loader)))
    assert rest.tolist() == list(range(24 * world_size, 297))


def resumed(loader: Any) -> list[Any]:
    again = loader_of(297)
    again.load_state_dict(loader.state_dict())
    return list(again)


def collections_keep_their_form() -> None:
    found: list[Any] = []
    for batch in loader_of(3, batch_size=4):
        texts = [f"text {number}" for number in batch.tolist()]
        data = {"p": Pair(batch, (batch * 2.0).unsqueeze(1)), "texts": tuple(texts), "loss": 0.5, "none": None}
        found.append(runtime.gather_for_metrics(data))
        boxes = [torch.full((number + 1,), number) for number in batch.tolist()]
        found.append(runtime.gather_for_metrics(boxes, use_gather_object=True))
    results, boxes = found
    assert results["p"].x.tolist() == [0, 1, 2]
    assert results["p"].y.tolist() == [[0.0], [2.0], [4.0]]
    assert results["texts"] == ["text 0", "text 1", "text 2"]
    assert results["loss"].tolist() == [0.5] * world_size
    assert results["none"] is None
    assert [box.tolist() for box in boxes] == [[0], [1, 1], [2, 2, 2]]


def batches_of_other_samplers() -> None:
    class Growing(BatchSampler):
        """Batches of 1, 2, 3, ... samples."""

        def __iter__(self) -> Iterator[list[int]]:
            return iter([list(range(n * (n + 1) // 2, (n + 1) * (n + 2) // 2)) for n in range(len(self))])

        def __len__(self) -> int:
            return 5

    own = loader_of(15, batch_size=1, batch_sampler=Growing(SequentialSampler(range(15)), 1, False))
    assert gathered(own) == list(range(15))
    single = loader_of(5, batch_size=None)
    assert [n for it in single for n in runtime.gather_for_metrics([it])] == list(range(5))
    torchs = DistributedSampler(Numbers(9), world_size, rank, shuffle=False)
    assert gathered(loader_of(9, sampler=torchs)) == list(range(9))
    stream = runtime.setup_dataloaders(DataLoader(Stream(), batch_size=4), split_iterable=False)
    assert sorted(gathered(stream)) == list(range(10))


def loops_inside_and_in_step() -> None:
    train, validation = loader_of(297), loader_of(9, batch_size=8)
    seen: list[int] = []
    for batch in train:
        # With 2 ranks: 5 rows each, one repeated.
        assert gathered(validation) == list(range(9))
        next(iter(validation))
        seen += runtime.gather_for_metrics(batch).tolist()
    assert seen == list(range(297))
    odd, even = loader_of(15), loader_of(16)
    for one, other in zip(odd, even, strict=True):
        assert runtime.gather_for_metrics(one, loader=odd).tolist() == list(range(15))
        assert runtime.gather_for_metrics(other, loader=even).tolist() == list(range(16))
    first, second = loader_of(31, batch_size=4), loader_of(36, batch_size=4)
    pairs = zip(first, second, strict=False)
    runtime.gather_for_metrics(next(pairs)[0])
    one = next(pairs)[0]
    with pytest.raises(UsageError, match="Name the loader"):
        runtime.gather_for_metrics(one)


def wrong_data_is_refused_on_every_rank() -> None:
    for batch in loader_of(13):
        for wrong, words in ((batch.repeat(2), "one row for each sample"), ({1}, "not set")):
            with pytest.raises(UsageError, match=words):
                runtime.gather_for_metrics(wrong)
        with pytest.raises(UsageError, match="one row for each sample"):
            runtime.gather_for_metrics(batch if rank else batch[:1])
        with pytest.raises(RankDisagreementError, match="the same collection"):
            runtime.gather_for_metrics(batch.unsqueeze(1).expand(-1, rank + 1))
        with pytest.raises(UsageError, match="no loop over this loader"):
            runtime.gather_for_metrics(batch, loader=loader_of(3))
    # Nothing is repeated here, so any rows will do.
    for batch in loader_of(16 * world_size):
        assert len(runtime.gather_for_metrics(batch.repeat(2))) == 16 * world_size


samples_come_once_and_in_order()
results_of_an_epoch_may_be_gathered_at_its_end()
collections_keep_their_form()
batches_of_other_samplers()
loops_inside_and_in_step()
wrong_data_is_refused_on_every_rank()
print("gathered", flush=True)
