"""A data loader that gives each rank its share, on its device, and can be resumed in the middle of an epoch.

This file decides how a loader is taken apart and put together again. Which samples a rank takes is the
sampler's business, and what seeds are made of is that of `nucleate.seed`.
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

from nucleate.devices import hooks_of
from nucleate.errors import ConfigurationError, UsageError
from nucleate.seed import derive_seed, seed_worker
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
) -> DataLoaderWrapper:
    """Return a loader for this rank with the options and the class of `loader`, which is not changed.

    Args:
        loader: The user's loader.
        num_replicas: Over how many ranks the data is split.
        rank: Which part this rank gets.
        device: Where batches are put; None leaves them.
        seed: Where the order of samples and the workers' seeds come from; the same on every rank.
        seed_workers: Give workers seeds that differ by rank, worker and epoch.
        use_distributed_sampler: Split the data. A dataset that is iterated over, and a loader that has a
            `DistributedSampler` already, are never split.

    Raises:
        ConfigurationError: There is no such rank among the replicas.
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
        # Not split, but still drawn from the seed alone; ranks differ, as they would with a plain loader.
        share = partial(_share, num_replicas=1, rank=0, seed=derive_seed(seed, rank), drop_last=drop_last)
    own = copy.copy(loader)
    # DataLoader refuses to set these once it is built; the copy is nobody else's.
    options = own.__dict__
    options["_iterator"] = None
    if loader.generator is None:
        # Otherwise each iteration would take a number from the global generator.
        options["generator"] = torch.Generator()
    if not isinstance(loader.dataset, IterableDataset):
        options.update(_samplers(loader, share))
    return DataLoaderWrapper(own, device, seed, rank, seed_workers, reseeds=loader.generator is None)


@final
class DataLoaderWrapper:
    """Stands before a loader: iterates epoch after epoch, and knows how far it came.

    Anything else, such as `dataset` or `batch_size`, is looked up on the loader.

    Args:
        loader: The loader of this rank, as `prepare` makes it.
        device: Where batches are put; None leaves them.
        seed: The seed that the ranks have in common.
        rank: This process among those that share the data.
        seed_workers: Whether workers get seeds made of `seed`.
        reseeds: Whether the loader's generator is the wrapper's to seed for each epoch.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        device: torch.device | None,
        seed: int,
        rank: int,
        seed_workers: bool,
        reseeds: bool,
    ) -> None:
        self.loader = loader
        self.device = device
        self._seed = seed
        self._rank = rank
        self._reseeds = reseeds
        self._seed_workers = seed_workers
        self._user_worker_init = loader.worker_init_fn
        # Where the next iteration begins, and where the current one is: (epoch, batches).
        self._next = (0, 0)
        self._position = (0, 0)

    def __len__(self) -> int:
        """Return how many batches an epoch has on this rank."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        epoch, skip = self._next
        self._next = (epoch + 1, 0)
        self._position = (epoch, skip)
        for number, batch in enumerate(self._batches(epoch, skip), skip + 1):
            # Before the yield: while the loop's body runs, its batch counts as delivered.
            self._position = (epoch, number)
            yield batch if self.device is None else move(batch, self.device)
        self._position = (epoch + 1, 0)

    def set_epoch(self, epoch: int) -> None:
        """Begin the next iteration at the start of `epoch`. It counts up by itself otherwise."""
        self._next = self._position = (epoch, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, how many of its batches were delivered, and the seed of their order."""
        epoch, batches = self._position
        return {"epoch": epoch, "batches": batches, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on where `state_dict` was called.

        Samples of batches already delivered are not loaded again, except from a dataset that can only be
        iterated over. The order of samples is exact; random numbers that workers draw start anew.

        Raises:
            UsageError: The state is of a loader with another seed.
        """
        if state["seed"] != self._seed:
            raise UsageError(
                f"this loader's order follows from seed {self._seed}, but the state is of a loader with seed "
                f"{state['seed']}: going on would give some samples twice and others never. Call "
                f"seed_everything({state['seed']}) before setup_dataloaders."
            )
        self._next = self._position = (int(state["epoch"]), int(state["batches"]))

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
        if self._seed_workers and loader.num_workers > 0:
            base = derive_seed(self._seed, epoch)
            loader.worker_init_fn = partial(_init_worker, rank=self._rank, base=base, then=self._user_worker_init)
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
    """Put every tensor of a collection on `device`; from pinned host memory without waiting for the copy.

    Args:
        data: A tensor, or dicts, lists, tuples and dataclasses of them. Anything else is kept.
        device: Where to.
    """
    from lightning_utilities.core.apply_func import apply_to_collection

    pins = hooks_of(device).pins_memory
    return apply_to_collection(
        data, (Tensor, PackedSequence), lambda it: it.to(device, non_blocking=pins and _is_pinned(it))
    )


def _is_pinned(data: Tensor | PackedSequence) -> bool:
    """Return whether a copy of it may go on while the program does. From other memory that is not safe on MPS."""
    parts = (data.data, data.sorted_indices, data.unsorted_indices) if isinstance(data, PackedSequence) else (data,)
    try:
        return all(part is None or part.is_pinned() for part in parts)
    except RuntimeError:  # Not every layout and subclass can say so.
        return False


def _share(source: Iterable[Any], **options: Any) -> Iterable[Any]:
    # A sampler that splits already would be split twice.
    return source if isinstance(source, DistributedSampler) else ShareSampler(source, **options)


def _samplers(loader: DataLoader[Any], share: Callable[[Iterable[Any]], Iterable[Any]]) -> dict[str, Any]:
    """Return what takes the place of the loader's samplers."""
    batches = loader.batch_sampler
    if batches is None:
        return {"sampler": share(loader.sampler)}
    if type(batches) is BatchSampler:
        # Share the samples and batch them again, so that every rank has batches of the loader's size.
        sampler = share(batches.sampler)
        batch_sampler = BatchSampler(cast(Any, sampler), batches.batch_size, batches.drop_last)
        return {"sampler": sampler if loader.batch_size is not None else loader.sampler, "batch_sampler": batch_sampler}
    if isinstance(getattr(batches, "sampler", None), DistributedSampler):
        return {}
    # How a sampler of the user's own makes its batches is not known, so the batches are shared as they are.
    return {"batch_sampler": share(batches)}


def _init_worker(worker_id: int, rank: int, base: int, then: Callable[[int], None] | None) -> None:
    seed_worker(worker_id, rank, base)
    if then is not None:
        then(worker_id)
