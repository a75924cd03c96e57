"""A stream of samples (an `IterableDataset`) that is dealt out to several ranks.

Every rank goes through the whole stream and keeps every `W`-th sample. This works for any stream that gives the same
samples in the same order on every rank.
"""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, final

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nucleate.errors import ConfigurationError
from nucleate.seed import host_states, set_host_states


def split_stream(
    loader: DataLoader[Any], num_replicas: int, rank: int, split: bool | None, warns: bool
) -> DataLoader[Any]:
    """Return a loader whose stream is dealt out to the ranks if `split` says so. Other loaders stay as they are.

    Args:
        loader: The user's loader, which is not changed.
        num_replicas: The number of ranks that split the data.
        rank: The number of this rank's part.
        split: Whether to deal the samples out. None leaves them, with a warning.
        warns: Whether this process gives the warning.

    Raises:
        ConfigurationError: `split` is not a bool or None.
    """
    if split is not None and not isinstance(split, bool):
        raise ConfigurationError(f"split_iterable is {split!r}; it must be True, False or None.")
    stream = getattr(loader, "dataset", None)
    if num_replicas == 1 or not isinstance(stream, IterableDataset) or isinstance(stream, SplitStream):
        return loader
    if split is None and warns:
        name = type(stream).__name__
        warnings.warn(
            f"{name} is an IterableDataset, which setup_dataloaders does not split: each of the {num_replicas} data "
            f"parallel ranks gets all samples that {name} gives. Pass split_iterable=True to deal them out, so that "
            f"each rank gets every {num_replicas}th sample. Pass split_iterable=False if {name} gives each rank its "
            "own samples.",
            stacklevel=5,  # the caller of `Runtime.setup_dataloaders`
        )
    if not split:
        return loader
    own = copy.copy(loader)
    # DataLoader refuses to set the attribute after construction. Nobody else has the copy, so this is safe.
    own.__dict__["dataset"] = SplitStream(stream, num_replicas, rank, loader.drop_last)
    return own


@final
class SplitStream(IterableDataset[Any]):
    """One rank's share of the samples of a stream. All other attributes are the stream's.

    Every rank gets as many samples as the others. If the samples at the end are too few for all ranks, some ranks
    repeat them. With `drop_last` they are left out. Each worker of a loader deals out the samples that it gets.

    Args:
        source: The stream.
        num_replicas: The number of ranks that share.
        rank: The number of this rank's share.
        drop_last: Leave out the last samples if they are too few for all ranks.
    """

    def __init__(self, source: Iterable[Any], num_replicas: int, rank: int, drop_last: bool) -> None:
        self.source = source
        self.num_replicas = num_replicas
        self.rank = rank
        self.drop_last = drop_last
        #: The random states that the next iteration starts with, in this process. None means the present ones.
        self.start: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, None
        return self._dealt(_Draws(start if get_worker_info() is None else None))

    def _dealt(self, draws: _Draws) -> Iterator[Any]:
        with draws.own():
            samples = iter(self.source)
        while True:
            with draws.own():
                group = list(islice(samples, self.num_replicas))
            is_whole = len(group) == self.num_replicas
            if is_whole or (group and not self.drop_last):
                yield group[self.rank % len(group)]
            if not is_whole:
                return

    def __len__(self) -> int:
        """Return the number of samples of each rank."""
        num_samples = len(self.source)  # type: ignore[arg-type]
        return num_samples // self.num_replicas if self.drop_last else -(-num_samples // self.num_replicas)

    def __getattr__(self, name: str) -> Any:
        if name == "source" or name.startswith("__"):  # While unpickling.
            raise AttributeError(name)
        return getattr(self.source, name)


class _Draws:
    """The random numbers of a stream in the main process: the same on every rank, whatever the training draws."""

    def __init__(self, start: dict[str, Any] | None) -> None:
        self._states: tuple[Any, ...] | None = None
        if start is not None:
            before = host_states()
            set_host_states(start)
            self._states = _present()
            set_host_states(before)

    @contextmanager
    def own(self) -> Iterator[None]:
        """Let the stream draw from its own states inside."""
        if self._states is None:
            yield
            return
        outside = _present()
        _put(self._states)
        try:
            yield
        finally:
            self._states = _present()
            _put(outside)


def _present() -> tuple[Any, ...]:
    """Return the present states of the host's generators, in the quickest form."""
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state(), random.getstate(), None if numpy is None else numpy.random.get_state()


def _put(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    if states[2] is not None:
        sys.modules["numpy"].random.set_state(states[2])
