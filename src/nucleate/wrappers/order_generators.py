"""The random generators that the order of a loader's samples is drawn from, and their states.

This file decides which generators these are: the global ones, and those that the loader and its samplers hold. The
samplers decide when they are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, final

import torch
from torch import Generator, Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from nucleate.seed import host_states, set_host_states

T = TypeVar("T")
#: The states of generators: the host's as `nucleate.seed` returns them, and those of own generators by their number.
States = dict[str, Any]

_TORCHS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@final
class OrderGenerators:
    """The generators that the order of a loader's samples is drawn from.

    Attributes:
        is_random: Whether the order may be random. It is not for samplers that count, for lists, and for a
            `DistributedSampler`, which has a seed of its own.
        are_torchs: Whether a random sampler of torch draws the order. It needs torch's generators only.

    Args:
        loader: The user's loader.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        leaf = innermost(loader)
        self.are_torchs = type(leaf) in _TORCHS
        self.is_random = not isinstance(loader.dataset, IterableDataset) and not _is_fixed(leaf)
        own: dict[int, Generator] = {}
        batches = loader.batch_sampler
        for holder in (loader.generator, loader.sampler, batches, getattr(batches, "sampler", None)):
            held = [holder] if isinstance(holder, Generator) else getattr(holder, "__dict__", {}).values()
            own.update((id(value), value) for value in held if isinstance(value, Generator))
        self._own = list(own.values())

    def states(self) -> States:
        """Return the present states."""
        return {**host_states(only_torch=self.are_torchs), "own": self.own_states()}

    def own_states(self) -> dict[str, Tensor]:
        """Return the present states of the generators that the loader and its samplers hold."""
        return {str(number): generator.get_state() for number, generator in enumerate(self._own)}

    def set_own(self, states: dict[str, Tensor]) -> None:
        """Set the generators that the loader and its samplers hold.

        Args:
            states: As `own_states` returns them. Where another number of generators was saved, nothing is set.
        """
        if len(states) == len(self._own):
            for number, generator in enumerate(self._own):
                generator.set_state(states[str(number)].cpu())

    @contextmanager
    def under(self, states: States) -> Iterator[None]:
        """Set all generators to `states` inside. The global ones get back their present states afterwards."""
        present = host_states(only_torch=self.are_torchs)
        try:
            self.set_own(states["own"])
            set_host_states(states)
            yield
        finally:
            set_host_states(present)

    def draw(self, source: Iterable[T], states: States) -> list[T]:
        """Return the samples of a sampler that rank 0's states give, and advance the generators of this rank.

        Generators that had rank 0's states go on after the samples, as in a single process. A global generator of
        another state goes on by as many numbers as torch's sampler draws from it.

        Args:
            source: The sampler.
            states: The states of rank 0.
        """
        present = self.states()
        if same(present, states):
            return list(source)
        with self.under(states):
            drawn = list(source)
        if self.are_torchs:
            _advance(source)
        return drawn


def innermost(loader: DataLoader[Any]) -> Any:
    """Return the sampler that decides the order of a loader's samples.

    Args:
        loader: The loader.
    """
    batches = loader.batch_sampler
    if batches is None:
        return loader.sampler
    inner = getattr(batches, "sampler", None)
    return inner if makes_plain_batches(batches) or isinstance(inner, DistributedSampler) else batches


def makes_plain_batches(batches: Any) -> bool:
    """Return whether a batch sampler only groups the samples of its sampler, as torch's does."""
    # torchdata's is torch's with a state.
    return type(batches) is BatchSampler or (
        isinstance(batches, BatchSampler) and type(batches).__module__.startswith("torchdata.")
    )


def same(one: Any, other: Any) -> bool:
    """Return whether two states are equal."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (tuple, list)) and any(isinstance(item, Tensor) for item in one):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def _is_fixed(sampler: Any) -> bool:
    return type(sampler) in (SequentialSampler, list, tuple, range) or isinstance(sampler, DistributedSampler)


def _advance(source: Any) -> None:
    """Draw as many numbers from torch's global generator as a random sampler of torch does."""
    if source.generator is not None:
        return
    if type(source) is RandomSampler:
        torch.empty((), dtype=torch.int64).random_()  # The seed of its own generator; a permutation would take long.
    else:
        next(iter(source), None)
