"""A data loader that gives each rank its share, on its device, and can be resumed in the middle of an epoch.

This file decides how a loader is split into its parts and built again, and what its state is. `passes.py` begins each
pass over it, and the sampler decides which samples a rank takes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from nucleate.cluster.worker_process import outlive_sigterm
from nucleate.devices import hooks_of
from nucleate.errors import ConfigurationError, UsageError
from nucleate.wrappers.deliveries import Deliveries
from nucleate.wrappers.epoch import epoch_of
from nucleate.wrappers.loader_position import LoaderPosition, read_position
from nucleate.wrappers.order_generators import OrderGenerators, innermost, makes_plain_batches
from nucleate.wrappers.passes import EpochMeeting, Pass, Passes
from nucleate.wrappers.sampler import ShareSampler


def prepare(
    loader: DataLoader[Any],
    *,
    num_replicas: int = 1,
    rank: int = 0,
    device: torch.device | None = None,
    meeting: EpochMeeting | None = None,
    seed_workers: bool = True,
    use_distributed_sampler: bool = True,
    deliveries: Deliveries | None = None,
) -> DataLoaderWrapper:
    """Return a loader for this rank with the options and the class of `loader`, which is not changed.

    Args:
        loader: The user's loader.
        num_replicas: The number of ranks that split the data.
        rank: The number of this rank's part.
        device: The device that batches are moved to; None leaves them.
        meeting: The exchange with the other ranks when an epoch begins. None means that this rank decides alone.
        seed_workers: On several ranks, give workers seeds that differ by rank. Otherwise torch draws them.
        use_distributed_sampler: Split the data. An iterable dataset, and a loader that already has a
            `DistributedSampler`, are never split.
        deliveries: Where the wrapper notes its batches.

    Raises:
        ConfigurationError: `rank` is not from 0 to `num_replicas - 1`.
        UsageError: `loader` is not a DataLoader, or is set up already.
    """
    if not 0 <= rank < num_replicas:
        raise ConfigurationError(f"rank {rank} of {num_replicas} replicas: ranks are 0 to {num_replicas - 1}.")
    if isinstance(loader, DataLoaderWrapper):
        raise UsageError("this data loader is set up already; call setup_dataloaders once for each loader.")
    if not isinstance(loader, DataLoader):
        raise UsageError(f"setup_dataloaders takes torch.utils.data.DataLoader objects, not {type(loader).__name__}.")
    generators = OrderGenerators(loader)
    own = copy.copy(loader)
    # DataLoader refuses to set these attributes after construction. Nobody else has the copy, so this is safe.
    options = own.__dict__
    options["_iterator"] = None
    has_others = num_replicas > 1 or meeting is not None
    share: ShareSampler | None = None
    leaf = innermost(loader)
    # A DistributedSampler already splits the data; a second split would be wrong.
    is_split = isinstance(loader.dataset, IterableDataset) or isinstance(leaf, DistributedSampler)
    if has_others and use_distributed_sampler and not is_split:
        drop_last = getattr(loader.batch_sampler, "drop_last", loader.drop_last)
        agree = None if meeting is None else meeting.agree
        share = ShareSampler(leaf, num_replicas, rank, drop_last, generators, agree)
        options.update(_samplers(loader, share))
    if meeting is not None and not use_distributed_sampler:
        # Each rank draws from its own generators, as a plain loader does.
        meeting = replace(meeting, has_copies=False)
    passes = Passes(own, generators, share, meeting, rank, seed_workers and has_others)
    return DataLoaderWrapper(own, device, passes, generators, num_replicas if share else 1, deliveries)


@final
class DataLoaderWrapper:
    """A wrapper of a loader that iterates epoch after epoch, and remembers its position.

    All other attributes, such as `dataset` or `batch_size`, are looked up on the loader.

    Args:
        loader: The loader of this rank, as `prepare` makes it.
        device: The device that batches are moved to; None leaves them.
        passes: Begins each iteration over the loader.
        generators: The generators that the order of the samples is drawn from.
        num_replicas: The number of ranks that share the samples of the loader.
        deliveries: Where the wrapper notes its batches.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        device: torch.device | None,
        passes: Passes,
        generators: OrderGenerators,
        num_replicas: int,
        deliveries: Deliveries | None = None,
    ) -> None:
        self.loader = loader
        self.device = device
        self._passes = passes
        self._generators = generators
        self._num_replicas = num_replicas
        self._deliveries = Deliveries() if deliveries is None else deliveries
        self._user_worker_init = loader.worker_init_fn
        # The start of the next iteration, and the position of the current one.
        self._next = self._position = LoaderPosition()

    def __len__(self) -> int:
        """Return how many batches an epoch has on this rank."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        # Not a generator: torch draws a number here, before the first batch is asked for.
        position, self._next = self._next, LoaderPosition(self._next.epoch + 1)
        self._position = position
        self._tell_epoch(position.epoch)
        if self.loader.num_workers > 0 and self._deliveries.termination is not None:
            self.loader.worker_init_fn = partial(_init_long_worker, then=self._user_worker_init)
        if position.own is not None:
            begun = self._passes.continue_own(position.own, position.start)
        elif position.batches:
            begun = self._passes.resume(position.start, position.batches)
        else:
            begun = self._passes.begin()
        return self._deliver(begun, position)

    def _deliver(self, begun: Pass, position: LoaderPosition) -> Iterator[Any]:
        skip = position.batches
        delivery = self._deliveries.begin(self, epoch_of(self.loader), skip, self._num_batches())
        complete = False
        try:
            for number, batch in enumerate(begun, skip + 1):
                # Before the yield: while the loop's body runs, its batch counts as delivered.
                self._position = LoaderPosition(position.epoch, number, begun.start)
                self._deliveries.deliver(delivery)
                yield batch if self.device is None else move(batch, self.device)
                self._deliveries.ask(delivery)
            self._position = LoaderPosition(position.epoch + 1)
            complete = True
        finally:
            self._deliveries.end(delivery, complete)

    def set_epoch(self, epoch: int) -> None:
        """Begin the next iteration at the start of `epoch`. Without this call, the epoch counts up by itself.

        The epoch is told to samplers that have a method `set_epoch`, such as `DistributedSampler`. Torch's other random
        samplers do not know epochs: their order follows from the generator when the iteration begins.
        """
        self._next = self._position = LoaderPosition(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the epoch, the number of its delivered batches, and the states that it was drawn under.

        Some loaders have a `state_dict` themselves, such as torchdata's `StatefulDataLoader`. If such a loader has an
        iterable dataset, the position contains the loader's state. Each rank then has a state of its own, as it has
        with `use_distributed_sampler=False`. In both cases, every rank must call this method.
        """
        return self._position.written(self.loader, self._generators, self._passes, self._num_replicas)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue at the position of the `state_dict` call.

        Samples of delivered batches are not loaded again, except from an iterable dataset. The order of samples is
        exact, and the global generators stay as they are. The workers' random numbers are new ones. The order of the
        following epochs is drawn from the generators: save a `RandomState` too.

        Raises:
            UsageError: The state is not that of a loader, or is one in the middle of an epoch of a loader with another
                number of samples, or with another number of samples in all ranks' batches of a step.
        """
        self._next = self._position = read_position(
            state, self.loader, self._generators, self._passes, self._num_replicas
        )

    def _num_batches(self) -> int | None:
        """Return how many batches an epoch has, or None for a stream, whose length only its end shows."""
        if isinstance(self.loader.dataset, IterableDataset):
            return None
        try:
            return len(self.loader)
        except TypeError:
            return None

    def _tell_epoch(self, epoch: int) -> None:
        batches = self.loader.batch_sampler
        for sampler in (self.loader.sampler, batches, getattr(batches, "sampler", None)):
            if callable(set_epoch := getattr(sampler, "set_epoch", None)):
                set_epoch(epoch)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # While unpickling.
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __repr__(self) -> str:
        return f"DataLoaderWrapper({self.loader!r})"


def move(data: Any, device: torch.device) -> Any:
    """Move every tensor of a collection to `device`; for pinned host memory, do not wait for the copy.

    Args:
        data: A tensor, or dicts, lists, tuples and dataclasses of tensors. Anything else is kept.
        device: The target device.
    """
    from lightning_utilities.core.apply_func import apply_to_collection

    pins = hooks_of(device).pins_memory
    return apply_to_collection(
        data, (Tensor, PackedSequence), lambda it: it.to(device, non_blocking=pins and _is_pinned(it))
    )


def _is_pinned(data: Tensor | PackedSequence) -> bool:
    """Return whether `data` is in pinned memory. From other memory, a copy without waiting is not safe on MPS."""
    parts = (data.data, data.sorted_indices, data.unsorted_indices) if isinstance(data, PackedSequence) else (data,)
    try:
        return all(part is None or part.is_pinned() for part in parts)
    except RuntimeError:  # Some layouts and subclasses do not support `is_pinned`.
        return False


def _samplers(loader: DataLoader[Any], share: Iterable[Any]) -> dict[str, Any]:
    """Return the replacements of the loader's samplers, by attribute name."""
    batches = loader.batch_sampler
    if batches is None:
        return {"sampler": share}
    if makes_plain_batches(batches):
        # Share the samples and batch them again, so that every rank gets batches of the loader's size.
        plain = BatchSampler(cast(Any, share), batches.batch_size, batches.drop_last)  # type: ignore[attr-defined]
        return {"sampler": share if loader.batch_size is not None else loader.sampler, "batch_sampler": plain}
    # A user's own batch sampler makes its batches in an unknown way, so the batches are shared unchanged.
    return {"batch_sampler": share}


def _init_long_worker(worker_id: int, then: Callable[[int], None] | None) -> None:
    outlive_sigterm()
    if then is not None:
        then(worker_id)
