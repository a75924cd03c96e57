"""The samples of an epoch that rows of data belong to, so that samples which a sampler has repeated can be left out.

A sampler repeats its first samples at the end of an epoch, so that every rank gets as many. The ranks' rows in turns
are the sampler's order, and the repeated samples are the last ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nucleate.errors import UsageError
from nucleate.wrappers.deliveries import Delivery
from nucleate.wrappers.epoch import Epoch


@dataclass(frozen=True)
class Share:
    """The place of rows in an epoch.

    Attributes:
        in_turns: Whether row `i` of rank `r` is sample `i * num_ranks + r`. Otherwise each rank has a batch of its own.
        num_real: How many of all ranks' rows in turns, or of all ranks' batches, are not repeated. None means all.
    """

    in_turns: bool
    num_real: int | None


def find_share(candidates: Sequence[Delivery], num_rows: int, num_ranks: int) -> Share:
    """Return the place of rows that this rank has computed from the batches of a loader.

    Args:
        candidates: The iterations that the rows may come from, the one that delivered last first.
        num_rows: The number of rows.
        num_ranks: The number of ranks that share the data.

    Raises:
        UsageError: The rows are neither those of the last batch nor those of all batches, or of two loaders.
    """
    if candidates and candidates[0].is_open and candidates[0].epoch is None:
        # A stream, or data that the user has split: nothing is repeated.
        return Share(in_turns=False, num_real=None)
    known = ((delivery, delivery.epoch) for delivery in candidates)
    epochs = [(delivery, epoch) for delivery, epoch in known if epoch is not None and epoch.num_ranks == num_ranks]
    found = [(delivery, share) for delivery, epoch in epochs if (share := _share_of(delivery, epoch, num_rows))]
    if not found:
        if epochs and epochs[0][1].repeats:
            raise UsageError(
                f"gather_for_metrics: {num_rows} rows are neither those of the last batch nor those of all batches of "
                "this epoch, so the samples that the sampler has repeated cannot be found. Give one row for each "
                "sample, or use all_gather."
            )
        return Share(in_turns=False, num_real=None)
    latest, share = found[0]
    for delivery, other in found[1:]:
        # A loop inside another one delivers several times in a row; loops in step take turns.
        in_step = delivery.is_open and 0 < latest.previous_turn < delivery.turn
        if other != share and (in_step or not latest.is_open):
            raise UsageError(
                "gather_for_metrics: the rows may come from a batch of one loader or of another one, which differ in "
                "the samples that are repeated. Name the loader: gather_for_metrics(data, loader=loader)."
            )
    return share


def _share_of(delivery: Delivery, epoch: Epoch, num_rows: int) -> Share | None:
    """Return the place of rows from an iteration, or None if the rows cannot come from it."""
    size = epoch.batch_size
    if size is None:
        if delivery.is_complete and epoch.repeats:
            return None
        return _share(epoch, delivery.number - 1, 1, in_turns=False)
    end = min(delivery.number * size, epoch.num_mine)
    # The last batch, unless its loop has ended; or all batches of the loop.
    begins = [] if delivery.is_complete else [(delivery.number - 1) * size]
    for begin in (*begins, delivery.first * size):
        if num_rows == end - begin:
            return _share(epoch, begin, num_rows, in_turns=True)
    return None


def _share(epoch: Epoch, begin: int, size: int, in_turns: bool) -> Share:
    real = epoch.num_real - begin * epoch.num_ranks
    return Share(in_turns, min(max(real, 0), size * epoch.num_ranks) if epoch.repeats else None)
