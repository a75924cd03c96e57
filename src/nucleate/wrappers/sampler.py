"""Samplers that choose a rank's samples, and samplers that note or repeat the states that an order was drawn under.

Every rank draws the same whole order from the states of rank 0's generators, and rank `r` of `W` takes every `W`-th
sample from the `r`-th on. So the batches of one step together equal the batch of a single process with `W` times the
batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any, cast, final

from torch.utils.data import Sampler, SequentialSampler

from nucleate.wrappers.order_generators import OrderGenerators, States, same


@final
class ShareSampler(Sampler[Any]):
    """One rank's share of the samples of another sampler.

    The order is what the other sampler draws from rank 0's generators when the first sample is asked for. A sampler
    without a length is shared while it draws, and must draw the same samples on every rank.

    Args:
        source: Draws indices, or whole batches of indices.
        num_replicas: The number of ranks that share.
        rank: The number of this rank's share.
        drop_last: Leave out the last samples if they are too few for all ranks; otherwise repeat the first samples.
        generators: The generators that `source` draws from.
        agree: Returns rank 0's value on every rank. None means that this rank's generators decide.
    """

    def __init__(
        self,
        source: Iterable[Any],
        num_replicas: int,
        rank: int,
        drop_last: bool,
        generators: OrderGenerators,
        agree: Callable[[Any], Any] | None = None,
    ) -> None:
        self.source = source
        self.num_replicas = num_replicas
        self.rank = rank
        self.drop_last = drop_last
        #: The states that the last order was drawn under, or None if it was not random.
        self.start: States | None = None
        self._generators = generators
        self._agree = agree
        self._drawn: Sequence[Any] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Call `set_epoch` of the other sampler, if it has that method."""
        if callable(set_epoch := getattr(self.source, "set_epoch", None)):
            set_epoch(epoch)

    def draw(self, is_used: bool) -> None:
        """Draw an order now, for a sampler that draws before its first sample is asked for.

        Args:
            is_used: Whether it is the order of the next iteration.
        """
        if hasattr(type(self.source), "__len__"):
            drawn = self._draw()
            self._drawn = drawn if is_used else None

    def __len__(self) -> int:
        """Return the number of samples of each rank."""
        return self._total(len(cast(Sized, self.source))) // self.num_replicas

    def __iter__(self) -> Iterator[Any]:
        if not hasattr(type(self.source), "__len__"):
            yield from self._share_as_it_goes()
            return
        drawn, self._drawn = self._drawn, None
        if drawn is None:
            drawn = self._draw()
        for position in range(self.rank, self._total(len(drawn)), self.num_replicas):
            yield drawn[position % len(drawn)]

    def draw_again(self, start: States) -> None:
        """Let the next iteration repeat an order. The global generators stay as they are.

        Args:
            start: The states that the order was drawn under.
        """
        with self._generators.under(start):
            self._drawn = list(self.source)
        self.start = start

    def _draw(self) -> Sequence[Any]:
        if type(self.source) is SequentialSampler:
            return range(len(self.source))  # A list of a billion numbers would be 8 GB.
        if not self._generators.is_random:
            return list(self.source)
        mine = self._generators.states()
        self.start = mine if self._agree is None else self._agree(mine)
        return self._generators.draw(self.source, self.start)

    def _share_as_it_goes(self) -> Iterator[Any]:
        samples = iter(self.source)
        while len(group := list(islice(samples, self.num_replicas))) == self.num_replicas:
            yield group[self.rank]

    def _total(self, drawn: int) -> int:
        rounds = drawn // self.num_replicas if self.drop_last else -(-drawn // self.num_replicas)
        return rounds * self.num_replicas


@final
class NotedSampler:
    """The user's sampler in a single process, which draws as ever. The states that it draws under are noted.

    Args:
        source: Draws indices or batches.
        generators: The generators that `source` draws from.
    """

    def __init__(self, source: Iterable[Any], generators: OrderGenerators) -> None:
        self.source = source
        #: The states that the last order was drawn under.
        self.start: States | None = None
        self._generators = generators

    def __iter__(self) -> Iterator[Any]:
        before = self._generators.states()
        samples = iter(self.source)
        # Most samplers draw when the first sample is asked for, but some do before.
        has_drawn = not same(before, self._generators.states())
        return self._samples(samples, before if has_drawn else None)

    def __len__(self) -> int:
        """Return the number of indices or batches."""
        return len(cast(Sized, self.source))

    def rest(self, start: States, skip: int) -> Iterator[Any]:
        """Iterate over the rest of an order. The global generators stay as they are.

        A sampler that draws each sample when it is asked for draws the rest from the present generators, as it would
        have done without the interruption.

        Args:
            start: The states that the order was drawn under.
            skip: The number of indices or batches to leave out, at least 1.
        """
        self.start = start
        with self._generators.under(start):
            samples = iter(self.source)
            for _ in islice(samples, skip):
                pass
        return samples

    def _samples(self, samples: Iterator[Any], start: States | None) -> Iterator[Any]:
        self.start = self._generators.states() if start is None else start
        yield from samples


@final
class RestSampler:
    """The rest of an order that was drawn before, to resume without loading delivered samples.

    Args:
        rest: Returns an iterator over the rest.
        length: Returns the number of indices or batches that are left.
    """

    def __init__(self, rest: Callable[[], Iterator[Any]], length: Callable[[], int]) -> None:
        self._rest, self._length = rest, length

    def __iter__(self) -> Iterator[Any]:
        return self._rest()

    def __len__(self) -> int:
        """Return the number of indices or batches that are left."""
        return max(0, self._length())
