"""The samples of an epoch of a loader: how many there are, and how many of them each rank gets."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from nucleate.wrappers.sampler import ShareSampler


@dataclass(frozen=True)
class Epoch:
    """An epoch of a loader whose samples, or whole batches, are shared by ranks.

    Attributes:
        num_ranks: The number of ranks that share.
        num_real: The number of samples, or of batches, without repeated ones.
        num_mine: The number of samples, or of batches, of each rank.
        batch_size: The number of samples of a full batch; None where whole batches are shared.
    """

    num_ranks: int
    num_real: int
    num_mine: int
    batch_size: int | None

    @property
    def repeats(self) -> bool:
        """Whether some ranks get samples that others have."""
        return self.num_mine * self.num_ranks > self.num_real


def epoch_of(loader: DataLoader[Any]) -> Epoch | None:
    """Return the samples of an epoch, or None where nothing is known to be shared.

    Args:
        loader: The loader of one rank.
    """
    if isinstance(loader.dataset, IterableDataset):
        return None
    batches = loader.batch_sampler
    sampler: Any = loader.sampler if batches is None else batches
    batch_size = None
    if type(batches) is BatchSampler:
        sampler, batch_size = batches.sampler, batches.batch_size
    if type(sampler) is ShareSampler and hasattr(type(sampler.source), "__len__"):
        num_real = len(sampler.source)  # type: ignore[arg-type]
    elif type(sampler) is DistributedSampler and isinstance(loader.dataset, Sized):
        num_real = len(loader.dataset)
    else:
        return None
    return Epoch(sampler.num_replicas, num_real, len(sampler), batch_size)
