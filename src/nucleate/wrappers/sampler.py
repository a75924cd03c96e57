"""Samplers that choose a rank's samples, in an order that follows from seed and epoch alone.

Every rank draws the same whole order, and rank `r` of `W` takes every `W`-th sample from the `r`-th on. So the batches
of one step together equal the batch of a single process with `W` times the batch size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any, cast, final

from torch.utils.data import RandomSampler, Sampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler

from nucleate.seed import derive_seed, seeded

_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@final
class ShareSampler(Sampler[Any]):
    """One rank's share of the samples of another sampler.

    While the other sampler draws, the global generators are seeded by seed and epoch; afterwards they get back their
    state. So a user's own sampler is reproducible too, and does not change the random numbers of the training. A
    generator of torch's samplers is not used. A sampler without a length is shared while it draws, and must draw the
    same samples on every rank.

    Args:
        source: Draws indices, or whole batches of indices.
        num_replicas: The number of ranks that share.
        rank: The number of this rank's share.
        seed: The seed of the order, the same for all ranks that share.
        drop_last: Leave out the last samples if they are too few for all ranks; otherwise repeat the first samples.
    """

    def __init__(self, source: Iterable[Any], num_replicas: int, rank: int, seed: int, drop_last: bool) -> None:
        self.source = _without_generator(source)
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; call `set_epoch` of the other sampler too, if it has that method."""
        self.epoch = epoch
        if callable(set_epoch := getattr(self.source, "set_epoch", None)):
            set_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of samples of each rank."""
        return self._total(len(cast(Sized, self.source))) // self.num_replicas

    def __iter__(self) -> Iterator[Any]:
        if not hasattr(type(self.source), "__len__"):
            yield from self._share_as_it_goes()
            return
        drawn = self._draw()
        for position in range(self.rank, self._total(len(drawn)), self.num_replicas):
            yield drawn[position % len(drawn)]

    def _draw(self) -> Sequence[Any]:
        if type(self.source) is SequentialSampler:
            return range(len(self.source))  # A list of a billion numbers would be 8 GB.
        with seeded(derive_seed(self.seed, self.epoch)):
            return list(self.source)

    def _share_as_it_goes(self) -> Iterator[Any]:
        samples = iter(self.source)
        while len(group := list(islice(samples, self.num_replicas))) == self.num_replicas:
            yield group[self.rank]

    def _total(self, drawn: int) -> int:
        rounds = drawn // self.num_replicas if self.drop_last else -(-drawn // self.num_replicas)
        return rounds * self.num_replicas


@final
class SkipSampler(Sampler[Any]):
    """The samples of another sampler without the first `skip`, to resume without loading delivered samples.

    Args:
        source: Draws indices or batches.
        skip: The number of indices or batches to leave out.
    """

    def __init__(self, source: Iterable[Any], skip: int) -> None:
        self.source = source
        self.skip = skip

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.source), self.skip, None)

    def __len__(self) -> int:
        """Return the number of indices or batches that are left."""
        return max(0, len(cast(Sized, self.source)) - self.skip)


def _without_generator(source: Iterable[Any]) -> Iterable[Any]:
    """Return a random sampler of torch without its own generator, so that the seeded generator decides."""
    if type(source) in _RANDOM and getattr(source, "generator", None) is not None:
        source = copy.copy(source)
        vars(source)["generator"] = None
    return source
