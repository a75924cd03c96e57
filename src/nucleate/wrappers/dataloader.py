"""A data loader that gives each rank its share, on its device, and can be resumed in the middle of an epoch.

This file decides how a loader is split into its parts and built again. The sampler decides which samples a rank takes,
and `nucleate.seed` derives the seeds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from nucleate.cluster.worker_process import outlive_sigterm
from nucleate.devices import hooks_of
from nucleate.errors import ConfigurationError, UsageError
from nucleate.seed import derive_seed, seed_worker
from nucleate.wrappers.deliveries import Deliveries
from nucleate.wrappers.epoch import epoch_of
from nucleate.wrappers.sampler import ShareSampler, SkipSampler


def prepare(
    loader: DataLoader[Any],
    *,
    num_replicas: int = 1,
    rank: int = 0,
    device: torch.device | None = None,
    seed: int = 0,
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
        seed: The seed for the order of samples and for the workers' seeds; the same on every rank.
        seed_workers: Give workers seeds that differ by rank, worker and epoch.
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
    drop_last = getattr(loader.batch_sampler, "drop_last", loader.drop_last)
    share: Callable[[Iterable[Any]], Iterable[Any]]
    if use_distributed_sampler:
        share = partial(_share, num_replicas=num_replicas, rank=rank, seed=seed, drop_last=drop_last)
    else:
        # Not split, but the order still follows from the seed alone; ranks differ, as with a plain loader.
        share = partial(_share, num_replicas=1, rank=0, seed=derive_seed(seed, rank), drop_last=drop_last)
    own = copy.copy(loader)
    # DataLoader refuses to set these attributes after construction. Nobody else has the copy, so this is safe.
    options = own.__dict__
    options["_iterator"] = None
    if loader.generator is None:
        # Otherwise each iteration would draw a number from the global generator.
        options["generator"] = torch.Generator()
    if not isinstance(loader.dataset, IterableDataset):
        options.update(_samplers(loader, share))
    return DataLoaderWrapper(
        own, device, seed, rank, seed_workers, reseeds=loader.generator is None, deliveries=deliveries
    )


@final
class DataLoaderWrapper:
    """A wrapper of a loader that iterates epoch after epoch, and remembers its position.

    All other attributes, such as `dataset` or `batch_size`, are looked up on the loader.

    Args:
        loader: The loader of this rank, as `prepare` makes it.
        device: The device that batches are moved to; None leaves them.
        seed: The seed that the ranks have in common.
        rank: The number of this rank among those that share the data.
        seed_workers: Whether workers get seeds derived from `seed`.
        reseeds: Whether the wrapper seeds the loader's generator for each epoch.
        deliveries: Where the wrapper notes its batches.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        device: torch.device | None,
        seed: int,
        rank: int,
        seed_workers: bool,
        reseeds: bool,
        deliveries: Deliveries | None = None,
    ) -> None:
        self.loader = loader
        self.device = device
        self._seed = seed
        self._rank = rank
        self._reseeds = reseeds
        self._deliveries = Deliveries() if deliveries is None else deliveries
        self._seed_workers = seed_workers
        self._user_worker_init = loader.worker_init_fn
        # The start of the next iteration, and the position of the current one: (epoch, batches).
        self._next = (0, 0)
        self._position = (0, 0)

    def __len__(self) -> int:
        """Return how many batches an epoch has on this rank."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        epoch, skip = self._next
        self._next = (epoch + 1, 0)
        self._position = (epoch, skip)
        delivery = self._deliveries.begin(self, epoch_of(self.loader), skip, self._num_batches())
        complete = False
        try:
            for number, batch in enumerate(self._batches(epoch, skip), skip + 1):
                # Before the yield: while the loop's body runs, its batch counts as delivered.
                self._position = (epoch, number)
                self._deliveries.deliver(delivery)
                yield batch if self.device is None else move(batch, self.device)
                self._deliveries.ask(delivery)
            self._position = (epoch + 1, 0)
            complete = True
        finally:
            self._deliveries.end(delivery, complete)

    def set_epoch(self, epoch: int) -> None:
        """Begin the next iteration at the start of `epoch`. Without this call, the epoch counts up by itself."""
        self._next = self._position = (epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of its delivered batches, and the seed of their order."""
        epoch, batches = self._position
        return {"epoch": epoch, "batches": batches, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue at the position of the `state_dict` call.

        Samples of delivered batches are not loaded again, except from an iterable dataset. The order of samples is
        exact. The workers' random numbers start from the beginning.

        Raises:
            UsageError: The state belongs to a loader with another seed.
        """
        if state["seed"] != self._seed:
            raise UsageError(
                f"this loader's order follows from seed {self._seed}, but the state is of a loader with seed "
                f"{state['seed']}: to continue would give some samples twice and others never. Call "
                f"seed_everything({state['seed']}) before setup_dataloaders."
            )
        self._next = self._position = (int(state["epoch"]), int(state["batches"]))

    def _num_batches(self) -> int | None:
        """Return how many batches an epoch has, or None for a stream, whose length only its end shows."""
        if isinstance(self.loader.dataset, IterableDataset):
            return None
        try:
            return len(self.loader)
        except TypeError:
            return None

    def _batches(self, epoch: int, skip: int) -> Iterator[Any]:
        for sampler in (
            self.loader.sampler,
            self.loader.batch_sampler,
            getattr(self.loader.batch_sampler, "sampler", None),
        ):
            if callable(set_epoch := getattr(sampler, "set_epoch", None)):
                set_epoch(epoch)
        if self._reseeds:
            cast(torch.Generator, self.loader.generator).manual_seed(derive_seed(self._seed, epoch, self._rank))
        loader = self.loader
        if loader.num_workers > 0:
            begin = self._user_worker_init
            if self._seed_workers:
                begin = partial(_init_worker, rank=self._rank, base=derive_seed(self._seed, epoch), then=begin)
            if self._deliveries.termination is not None:
                begin = partial(_init_long_worker, then=begin)
            loader.worker_init_fn = begin
        if skip == 0:
            yield from loader
            return
        if isinstance(loader.dataset, IterableDataset):
            batches = iter(loader)
            for _ in range(skip):
                next(batches, None)
            yield from batches
            return
        rest = copy.copy(loader)
        index = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        rest.__dict__.update({"_iterator": None, index: SkipSampler(getattr(loader, index), skip)})
        yield from rest

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


def _share(source: Iterable[Any], **options: Any) -> Iterable[Any]:
    # A DistributedSampler already splits the data; a second split would be wrong.
    return source if isinstance(source, DistributedSampler) else ShareSampler(source, **options)


def _samplers(loader: DataLoader[Any], share: Callable[[Iterable[Any]], Iterable[Any]]) -> dict[str, Any]:
    """Return the replacements of the loader's samplers, by attribute name."""
    batches = loader.batch_sampler
    if batches is None:
        return {"sampler": share(loader.sampler)}
    if type(batches) is BatchSampler:
        # Share the samples and batch them again, so that every rank gets batches of the loader's size.
        sampler = share(batches.sampler)
        batch_sampler = BatchSampler(cast(Any, sampler), batches.batch_size, batches.drop_last)
        return {"sampler": sampler if loader.batch_size is not None else loader.sampler, "batch_sampler": batch_sampler}
    if isinstance(getattr(batches, "sampler", None), DistributedSampler):
        return {}
    # A user's own batch sampler makes its batches in an unknown way, so the batches are shared unchanged.
    return {"batch_sampler": share(batches)}


def _init_long_worker(worker_id: int, then: Callable[[int], None] | None) -> None:
    outlive_sigterm()
    if then is not None:
        then(worker_id)


def _init_worker(worker_id: int, rank: int, base: int, then: Callable[[int], None] | None) -> None:
    seed_worker(worker_id, rank, base)
    if then is not None:
        then(worker_id)
