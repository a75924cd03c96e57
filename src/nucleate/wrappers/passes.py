"""The passes over a data loader: the order of each pass, the seeds of its workers, and where it goes on.

In a single process a pass draws what a plain `DataLoader` draws, in the same order and from the same generators. On
several ranks the random states of rank 0 decide, and the ranks exchange them when a pass begins.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar, final

import torch
from torch import Generator
from torch.utils.data import DataLoader, IterableDataset

from nucleate.cluster.communicator import Communicator
from nucleate.errors import UsageError
from nucleate.seed import derive_seed
from nucleate.wrappers.order_generators import OrderGenerators, States
from nucleate.wrappers.sampler import NotedSampler, RestSampler, ShareSampler
from nucleate.wrappers.stream import SplitStream

T = TypeVar("T")
_END = object()


@final
@dataclass(frozen=True)
class EpochMeeting:
    """The exchange of several ranks when an epoch begins.

    Attributes:
        communicator: The communicator of this process.
        has_copies: Whether several ranks get the same part of the data, as ranks of one tensor parallel group do.
    """

    communicator: Communicator
    has_copies: bool = False

    def agree(self, mine: T) -> T:
        """Return rank 0's value on every rank.

        Args:
            mine: The value of this rank.

        Raises:
            RankDisagreementError: A rank is in another call.
            RankFailedError: A rank has ended or died.
        """
        with self.communicator.meeting("the start of an epoch of a data loader"):
            return self.communicator.broadcast(mine)

    def gather(self, mine: T) -> list[T]:
        """Return the values of all ranks.

        Args:
            mine: The value of this rank.
        """
        with self.communicator.meeting("the state of a data loader"):
            return self.communicator.gather_objects(mine)


@final
class Pass:
    """One iteration over a loader.

    Attributes:
        start: The random states that its order was drawn under, from the first batch on. None if it is not random.
    """

    def __init__(self, passes: Passes, batches: Iterator[Any], start: States | None, seeds: Generator | None) -> None:
        self.start = start
        self._passes, self._batches, self._seeds = passes, batches, seeds

    def __iter__(self) -> Iterator[Any]:
        # A subclass of DataLoader may begin its iteration only here.
        with self._passes.drawing(self._seeds):
            batch = next(self._batches, _END)
        self.start = self.start or self._passes.drawn_under
        if batch is not _END:
            yield batch
            del batch
            yield from self._batches


@final
class Passes:
    """The passes over the loader of one rank.

    Args:
        loader: The loader of this rank.
        generators: The generators that the order of its samples is drawn from.
        share: The sampler that takes this rank's samples, or None if nothing is shared.
        meeting: The exchange with the other ranks, or None for a single process.
        rank: The number of this rank's part of the data.
        seeds_workers: Whether workers get seeds that differ by rank. Otherwise torch draws them.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        generators: OrderGenerators,
        share: ShareSampler | None,
        meeting: EpochMeeting | None,
        rank: int,
        seeds_workers: bool,
    ) -> None:
        self._loader, self._generators, self._share = loader, generators, share
        self._meeting, self._rank, self._seeds_workers = meeting, rank, seeds_workers
        self._index = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self._is_stream = isinstance(loader.dataset, IterableDataset)
        self._noted = None
        if share is None and generators.is_random:
            self._noted = NotedSampler(getattr(loader, self._index), generators)

    @property
    def drawn_under(self) -> States | None:
        """The states that the last order was drawn under, or None if it was not random."""
        sampler = self._noted or self._share
        return None if sampler is None else sampler.start

    def begin(self) -> Pass:
        """Begin a pass at its start. Every rank calls this method if the order is random."""
        start = None
        if self._is_stream and (self._meeting is None or isinstance(self._loader.dataset, SplitStream)):
            start = self._agreed(self._generators.states())
        if self._share is not None and _draws_early(self._share):
            # torchdata's random sampler draws before the seed of the workers, and once more when workers start.
            self._share.draw(is_used=not self._starts_workers)
        seeds = self._seeds(start)
        self._begin_stream(start)
        with self.drawing(seeds):
            return Pass(self, iter(self._loader), start, seeds)

    def resume(self, start: States | None, skip: int) -> Pass:
        """Begin a pass after batches that were delivered before. The global generators stay as they are.

        Args:
            start: The states that the order was drawn under.
            skip: The number of delivered batches.
        """
        if self._is_stream:
            return self._resume_stream(start, skip)
        rest = copy.copy(self._loader)
        indices = getattr(self._loader, self._index)

        def remaining() -> Iterator[Any]:
            if start is not None and self._noted is not None:
                return self._noted.rest(start, skip)
            if start is not None and self._share is not None:
                self._share.draw_again(start)
            return islice(iter(indices), skip, None)

        # DataLoader refuses to set these attributes after construction. Nobody else has the copy, so this is safe.
        rest.__dict__.update({"_iterator": None, self._index: RestSampler(remaining, lambda: len(indices) - skip)})
        rest.generator = self._other_seeds(skip)
        return Pass(self, iter(rest), start, None)

    def continue_own(self, state: Any, start: States | None) -> Pass:
        """Begin a pass at the place that the loader's own `state_dict` has saved, such as torchdata's.

        Args:
            state: The state.
            start: The states that the order was drawn under.
        """
        self._loader.load_state_dict(self.of_this_rank(state))  # type: ignore[attr-defined]
        with self._generators.under(start or self._generators.states()):
            seeds = self._seeds(start) if start else None
            self._begin_stream(start)
            with self.drawing(seeds):
                return Pass(self, iter(self._loader), start, seeds)

    def own_state(self) -> Any:
        """Return the state of the loader itself; see `of_ranks`."""
        return self.of_ranks(self._loader.state_dict())  # type: ignore[attr-defined]

    def of_ranks(self, mine: Any) -> Any:
        """Return the states of all ranks, which differ: every rank calls this method. One process returns its own.

        Args:
            mine: The state of this rank.
        """
        if self._meeting is None:
            return mine
        return {f"rank_{rank}": state for rank, state in enumerate(self._meeting.gather(mine))}

    def of_this_rank(self, states: Any) -> Any:
        """Return the state of this rank from those that `of_ranks` has returned.

        Args:
            states: The states.

        Raises:
            UsageError: Another number of ranks has saved them.
        """
        saved_by = len(states) if isinstance(states, dict) and "rank_0" in states else 1
        fits = saved_by == (1 if self._meeting is None else self._meeting.communicator.world_size)
        if not fits:
            raise UsageError(
                "in this state of a data loader, each rank has a state of its own, and another number of ranks has "
                "saved it. Resume with as many ranks, or begin the epoch at its start by `loader.set_epoch(epoch)`."
            )
        return states if self._meeting is None else states[f"rank_{self._meeting.communicator.rank}"]

    @property
    def differ_by_rank(self) -> bool:
        """Whether each rank draws an order of its own."""
        return self._noted is not None and self._meeting is not None

    def _resume_stream(self, start: States | None, skip: int) -> Pass:
        with self._generators.under(start or self._generators.states()):
            seeds = self._seeds(start)
            self._begin_stream(start)
            with self.drawing(seeds):
                batches = iter(self._loader)
                for _ in range(skip):
                    next(batches, None)
        return Pass(self, batches, start, None)

    @contextmanager
    def drawing(self, seeds: Generator | None) -> Iterator[None]:
        """Let torch draw the order from a sampler that notes the states, and the workers' seeds from `seeds`.

        Args:
            seeds: A generator; None means the generator that torch draws them from.
        """
        options, before = self._loader.__dict__, {}
        if self._noted is not None:
            before[self._index] = options[self._index]
            options[self._index] = self._noted
        if seeds is not None:
            before["generator"] = options["generator"]
            options["generator"] = seeds
        try:
            yield
        finally:
            options.update(before)

    @property
    def _starts_workers(self) -> bool:
        """Whether the next iteration starts new workers."""
        loader = self._loader
        return loader.num_workers > 0 and not (loader.persistent_workers and loader._iterator is not None)

    def _agreed(self, mine: T) -> T:
        return mine if self._meeting is None else self._meeting.agree(mine)

    def _begin_stream(self, start: States | None) -> None:
        """Let a stream that is dealt out in this process draw from states of its own, as on the other ranks."""
        if isinstance(self._loader.dataset, SplitStream) and self._loader.num_workers == 0:
            self._loader.dataset.start = start

    def _seeds(self, start: States | None) -> Generator | None:
        """Return the generator that torch draws the seeds of new workers from, or None for its own.

        Args:
            start: The states of rank 0 at the start of a stream.
        """
        loader = self._loader
        if not self._starts_workers:
            return None
        if isinstance(loader.dataset, SplitStream):
            # Every rank goes through the same stream, so its workers need the same seeds.
            assert start is not None
            _base_seed(loader)
            seeds = Generator()
            seeds.set_state(start["torch"] if loader.generator is None else start["own"]["0"])
            return seeds
        if not self._seeds_workers:
            return None
        base = _base_seed(loader)
        has_copies = self._meeting is not None and self._meeting.has_copies
        if has_copies or (self._share is not None and self._generators.is_random):
            base = self._agreed(base)
        return Generator().manual_seed(derive_seed(base, self._rank))

    def _other_seeds(self, skip: int) -> Generator:
        """Return a generator for the seeds of the workers that go on, and leave the global one as it is."""
        if self._loader.num_workers == 0:
            return Generator()
        state = torch.default_generator.get_state()
        base = int(torch.empty((), dtype=torch.int64).random_().item())
        torch.default_generator.set_state(state)
        if self._meeting is not None and self._meeting.has_copies:
            base = self._agreed(base)
        return Generator().manual_seed(derive_seed(base, self._rank, skip))


def _draws_early(share: ShareSampler) -> bool:
    """Return whether a plain loader draws its order before the first batch is asked for."""
    return type(share.source).__module__.startswith("torchdata.")


def _base_seed(loader: DataLoader[Any]) -> int:
    """Draw the number that the seeds of workers follow from, as torch/utils/data/dataloader.py does (2.13)."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=loader.generator).item())
