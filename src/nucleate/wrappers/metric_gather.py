"""The results of all ranks for the samples of a batch or of an epoch, each sample once, in the sampler's order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast, final

import torch
from torch import Tensor

from nucleate.cluster.communicator import Communicator
from nucleate.errors import NucleateError, RankDisagreementError, UsageError
from nucleate.strategies.base import Strategy
from nucleate.wrappers.deliveries import Deliveries
from nucleate.wrappers.epoch_share import Share, find_share

#: Leaves of a collection that every sample may have one of.
_PLAIN = (str, bytes, int, float, bool, type(None))


def gather_for_metrics(
    data: Any,
    communicator: Communicator,
    strategy: Strategy,
    deliveries: Deliveries,
    loader: Any,
    use_gather_object: bool,
) -> Any:
    """Return the results of all ranks. See `Runtime.gather_for_metrics`.

    Args:
        data: The results of this rank.
        communicator: The communicator of this process.
        strategy: Knows which ranks share the data.
        deliveries: The loops over the runtime's loaders.
        loader: The loader that the samples come from, or None.
        use_gather_object: Whether `data` is a list with any object for each sample.
    """

    def share(num_rows: int) -> Share:
        candidates = [each for each in deliveries.recent() if loader is None or each.loader() is loader]
        if loader is not None and not candidates:
            raise UsageError(
                "gather_for_metrics(loader=...): there was no loop over this loader, or another loop has ended since "
                "then. Pass a loader that `setup_dataloaders` returned, in or right after the loop over it."
            )
        return find_share(candidates, num_rows, strategy.data_parallel_size)

    return _MetricGather(communicator, strategy.data_parallel_rank, share).gather(data, use_gather_object)


@dataclasses.dataclass
class _Leaf:
    """A value that is gathered.

    Attributes:
        kind: `"rows"` (a tensor with a row for each sample), `"objects"` (a list with an object for each sample) or
            `"value"` (one tensor without a dimension for each rank).
        value: The value.
        share: The place of the rows in the epoch.
    """

    kind: str
    value: Any
    share: Share | None = None

    @property
    def form(self) -> tuple[Any, ...]:
        """The kind, dtype and shape of the value, which must be equal on all ranks but for the number of rows."""
        if self.kind == "objects":
            return (self.kind, self.share)
        return (self.kind, str(self.value.dtype), tuple(self.value.shape[1:]), self.value.device.type, self.share)


@final
class _MetricGather:
    """A gathering of results.

    Args:
        communicator: The communicator of this process.
        data_rank: The number of this rank's part of the data.
        find_share: Returns the place of a number of rows.
    """

    def __init__(self, communicator: Communicator, data_rank: int, find_share: Callable[[int], Share]) -> None:
        self._communicator = communicator
        self._data_rank = data_rank
        self._find_share = find_share
        self._leaves: list[_Leaf] = []

    def gather(self, data: Any, as_objects: bool) -> Any:
        """Return the results of all ranks.

        Args:
            data: A collection of tensors, lists and numbers.
            as_objects: Whether `data` is a list with one object for each sample.
        """
        error: NucleateError | None = None
        skeleton: Any = None
        try:
            skeleton = self._take_objects(data) if as_objects else self._take(data)
            for leaf in self._leaves:
                if leaf.kind != "value" and len(leaf.value):
                    leaf.share = self._find_share(len(leaf.value))
        except NucleateError as caught:
            error = caught
        facts = self._communicator.gather_objects(
            (
                self._data_rank,
                None if error is None else str(error),
                [leaf.form for leaf in self._leaves],
                [len(leaf.value) if leaf.kind != "value" else 0 for leaf in self._leaves],
                [leaf.value if leaf.kind == "objects" else None for leaf in self._leaves],
            )
        )
        if error is not None:
            raise error
        _check(facts)
        # Ranks that share a part of the data have the same results; one of them counts.
        ranks = {data_rank: rank for rank, (data_rank, *_) in reversed(list(enumerate(facts)))}
        chosen = [ranks[data_rank] for data_rank in sorted(ranks)]
        results = [
            self._gather_leaf(leaf, chosen, [fact[3][index] for fact in facts], [fact[4][index] for fact in facts])
            for index, leaf in enumerate(self._leaves)
        ]
        return _put(skeleton, results)

    def _gather_leaf(self, leaf: _Leaf, chosen: list[int], num_rows: list[int], objects: list[Any]) -> Any:
        if leaf.kind == "value":
            return self._communicator.all_gather(leaf.value)[chosen]
        if leaf.kind == "objects":
            return _joined([objects[rank] for rank in chosen], leaf.share, _in_turns, _one_by_one)
        most, value = max(num_rows), cast(Tensor, leaf.value)
        if len(value) < most:
            value = torch.cat([value, value.new_zeros((most - len(value), *value.shape[1:]))])
        everything = self._communicator.all_gather(value)
        parts = [everything[rank, : num_rows[rank]] for rank in chosen]
        return _joined(parts, leaf.share, lambda equal: torch.stack(equal, 1).flatten(0, 1), torch.cat)

    def _take(self, data: Any) -> Any:
        """Return the collection with the number of a leaf in the place of each leaf."""
        if isinstance(data, Tensor):
            return self._add("rows" if data.dim() else "value", data.detach())
        if isinstance(data, (bool, int, float)):
            return self._add("value", torch.tensor(data, device=self._communicator.device))
        if isinstance(data, Mapping):
            return {key: self._take(value) for key, value in data.items()}
        if isinstance(data, tuple) and hasattr(data, "_fields"):
            return type(data)(*map(self._take, data))
        if isinstance(data, (list, tuple)):
            if all(isinstance(item, _PLAIN) for item in data):
                return self._take_objects(data)
            return type(data)(map(self._take, data))
        if dataclasses.is_dataclass(data) and not isinstance(data, type):
            names = [field.name for field in dataclasses.fields(data) if field.init]
            return dataclasses.replace(data, **{name: self._take(getattr(data, name)) for name in names})
        if data is None:
            return None
        raise UsageError(
            f"gather_for_metrics takes tensors, numbers and lists, not {type(data).__name__}. For a list with any "
            "object for each sample, pass use_gather_object=True."
        )

    def _take_objects(self, data: Any) -> Any:
        if not isinstance(data, (list, tuple)):
            raise UsageError(
                f"gather_for_metrics(use_gather_object=True) takes a list with an object for each sample, not "
                f"{type(data).__name__}."
            )
        return self._add("objects", list(data))

    def _add(self, kind: str, value: Any) -> _Place:
        self._leaves.append(_Leaf(kind, value))
        return _Place(len(self._leaves) - 1)


@dataclasses.dataclass(frozen=True)
class _Place:
    """The number of a leaf, in the place of the leaf."""

    number: int


def _put(skeleton: Any, results: list[Any]) -> Any:
    if isinstance(skeleton, _Place):
        return results[skeleton.number]
    if isinstance(skeleton, dict):
        return {key: _put(value, results) for key, value in skeleton.items()}
    if isinstance(skeleton, tuple) and hasattr(skeleton, "_fields"):
        return type(skeleton)(*(_put(item, results) for item in skeleton))
    if isinstance(skeleton, (list, tuple)):
        return type(skeleton)(_put(item, results) for item in skeleton)
    if dataclasses.is_dataclass(skeleton) and not isinstance(skeleton, type):
        names = [field.name for field in dataclasses.fields(skeleton) if field.init]
        return dataclasses.replace(skeleton, **{name: _put(getattr(skeleton, name), results) for name in names})
    return skeleton


def _in_turns(parts: list[list[Any]]) -> list[Any]:
    return [item for row in zip(*parts, strict=True) for item in row]


def _one_by_one(parts: list[list[Any]]) -> list[Any]:
    return [item for part in parts for item in part]


def _joined(
    parts: list[Any],
    share: Share | None,
    in_turns: Callable[[list[Any]], Any],
    one_by_one: Callable[[list[Any]], Any],
) -> Any:
    """Join the ranks' rows, without those that are repeated."""
    if share is None:
        return one_by_one(parts)
    if share.in_turns:
        return in_turns(parts)[: share.num_real]
    # At least one part: a tensor of no rows still has its other dimensions.
    return one_by_one(parts[: share.num_real]) if share.num_real != 0 else parts[0][:0]


def _check(facts: list[Any]) -> None:
    for rank, (_, error, forms, *_) in enumerate(facts):
        if error is not None:
            raise UsageError(f"rank {rank}: {error}")
        if forms != facts[0][2]:
            raise RankDisagreementError(
                f"gather_for_metrics: rank 0 brings {facts[0][2]} but rank {rank} brings {forms}. Every rank must "
                "bring the same collection, and tensors whose shapes differ in the number of rows only."
            )
