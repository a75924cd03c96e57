"""The ranks of a runtime: the methods that communicate between the processes, or move data to the device of one."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torch import nn

from nucleate.runtime.parts import Parts
from nucleate.wrappers.dataloader import DataLoaderWrapper, move

T = TypeVar("T")


class Ranks(Parts):
    """The methods of a `Runtime` that communicate between the processes."""

    def to_device(self, obj: T) -> T:
        """Move a module, a tensor or every tensor of a collection to the device."""
        if isinstance(obj, nn.Module):
            return cast(T, self._accelerator.setup(obj))
        return cast(T, move(obj, self._device))

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank 0 only."""
        if self.is_global_zero:
            builtins.print(*args, **kwargs)  # noqa: T201

    def barrier(self, name: str | None = None) -> None:
        """Wait until every rank has called this method.

        Args:
            name: A name for the readers of the script, and for messages about ranks that wait.
        """
        self.launch()
        self._communicator.barrier(name)

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Return rank `src`'s object on every rank; see `Communicator.broadcast`."""
        self.launch()
        return self._communicator.broadcast(obj, src)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Return every rank's tensors stacked along a new leading axis; see `Communicator.all_gather`.

        Args:
            data: See `Communicator.all_gather`.
            group: A process group, or the name of an axis of the strategy's mesh, such as `"tp"` or `"data"`. None
                takes all ranks.
            sync_grads: See `Communicator.all_gather`.
        """
        self.launch()
        return self._communicator.all_gather(data, sync_grads, self._group(group))

    def gather_for_metrics(
        self, data: Any, *, loader: DataLoaderWrapper | None = None, use_gather_object: bool = False
    ) -> Any:
        """Return the results of all ranks for the samples of a batch, each sample once, in the sampler's order.

        A sampler repeats samples where their number does not divide by the number of ranks. They are left out here. So
        metrics over an epoch are those of one process. Call it in the loop over a loader of `setup_dataloaders` with
        the results of a batch, or after the loop with those of all batches.

        Args:
            data: A tensor with a row for each sample, or dicts, lists, tuples and dataclasses of such tensors. A list
                of plain values, such as texts, has one for each sample too. A number, or a tensor without a dimension,
                becomes a tensor with the value of each rank.
            loader: The loader that the samples come from. None takes the one that has delivered the last batch.
            use_gather_object: Whether `data` is a list with any object for each sample, such as tensors of different
                shapes. The objects are pickled.

        Returns:
            The collection with the rows of all ranks. Its tensors carry no gradient history.

        Raises:
            UsageError: Some samples are repeated, but `data` does not have one row for each sample of a batch or of all
                batches. Or two loops over loaders run in step, and `loader` does not say which one counts.
            RankDisagreementError: The ranks bring different collections.
        """
        from nucleate.wrappers.metric_gather import gather_for_metrics

        self.launch()
        with self._communicator.meeting("gather_for_metrics"):
            return gather_for_metrics(
                data, self._communicator, self._strategy, self._deliveries, loader, use_gather_object
            )

    def all_reduce(self, data: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return the combination of every rank's tensors; see `Communicator.all_reduce`.

        Args:
            data: See `Communicator.all_reduce`.
            group: A process group, or the name of an axis of the strategy's mesh, such as `"tp"` or `"data"`. None
                takes all ranks.
            reduce_op: See `Communicator.all_reduce`.
        """
        self.launch()
        return self._communicator.all_reduce(data, reduce_op, self._group(group))

    def _group(self, group: Any) -> Any:
        return self._strategy.group_of(group) if group in self._strategy.axes else group

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """Run the block on rank 0 before the other ranks, for example to prepare a file that all ranks then read.

        Args:
            local: Whether the first process of each node goes first, where nodes have file systems of their own.
        """
        self.launch()
        goes_first = self.local_rank == 0 if local else self.is_global_zero
        if not goes_first:
            self._communicator.barrier("rank_zero_first")
        try:
            yield
        finally:
            # This also happens if rank 0 raised an error. The other ranks continue and do not wait forever.
            if goes_first:
                self._communicator.barrier("rank_zero_first")
