"""The iterations of a runtime's loaders: which batch was delivered last, and how many are left.

Each loader notes its batches here. Gradient accumulation asks for the end of an epoch, and `gather_for_metrics` asks
which samples a batch has.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Protocol, final

from nucleate.wrappers.epoch import Epoch


class Termination(Protocol):
    """The part of the end at SIGTERM that loops need."""

    def batch_asked(self, delivery: Delivery, /) -> None:
        """End this process if a loop has made its last step."""
        ...


@dataclass(eq=False)
class Delivery:
    """One iteration of a loader.

    Attributes:
        loader: The wrapper of the loader, as long as it is alive.
        epoch: The samples of the epoch, or None where nothing is known to be shared.
        first: The number of batches that were skipped, because an earlier run has delivered them.
        num_batches: The number of batches of an epoch, or None where the loader has no length.
        number: The number of delivered batches, with the skipped ones.
        turn: The number of its last batch among all batches that the runtime's loaders have delivered.
        previous_turn: The same number of the batch before, or 0.
        is_open: Whether the loop over the loader still runs.
        is_complete: Whether the loop has ended by itself.
    """

    loader: weakref.ref[Any]
    epoch: Epoch | None
    first: int
    num_batches: int | None
    number: int
    turn: int = 0
    previous_turn: int = 0
    is_open: bool = True
    is_complete: bool = False

    @property
    def remaining(self) -> int | None:
        """The number of batches that are left, or None where the loader has no length."""
        return None if self.num_batches is None else max(0, self.num_batches - self.number)


@final
class Deliveries:
    """The iterations of the loaders of one runtime."""

    def __init__(self) -> None:
        #: The number of batches that all loaders together have delivered.
        self.turn = 0
        #: The end of the loops at SIGTERM, if the runtime handles it.
        self.termination: Termination | None = None
        self._open: list[Delivery] = []
        self._ended: Delivery | None = None

    def begin(self, loader: Any, epoch: Epoch | None, skipped: int, num_batches: int | None) -> Delivery:
        """Note that a loop over a loader begins.

        Args:
            loader: The wrapper of the loader.
            epoch: The samples of the epoch.
            skipped: The number of batches that are skipped.
            num_batches: The number of batches of an epoch, or None where the loader has no length.
        """
        delivery = Delivery(weakref.ref(loader), epoch, skipped, num_batches, skipped)
        self._open.append(delivery)
        return delivery

    def deliver(self, delivery: Delivery) -> None:
        """Note that a loop gets its next batch."""
        self.turn += 1
        delivery.number += 1
        delivery.previous_turn, delivery.turn = delivery.turn, self.turn

    def ask(self, delivery: Delivery) -> None:
        """Note that a loop asks for its next batch, after the first.

        Raises:
            SystemExit: SIGTERM ends the training here.
        """
        if self.termination is not None:
            self.termination.batch_asked(delivery)

    def end(self, delivery: Delivery, complete: bool) -> None:
        """Note that a loop over a loader has ended.

        Args:
            delivery: The iteration.
            complete: Whether it has delivered all batches.
        """
        self._open.remove(delivery)
        delivery.is_open, delivery.is_complete = False, complete
        self._ended = delivery

    def open(self) -> list[Delivery]:
        """Return the iterations that run, the one that delivered last first."""
        running = [delivery for delivery in self._open if delivery.turn]
        return sorted(running, key=lambda delivery: -delivery.turn)

    def recent(self) -> list[Delivery]:
        """Return the iterations that run and the one that ended last, the one that delivered last first."""
        found, ended = self.open(), self._ended
        if ended is not None and ended.turn:
            found.append(ended)
        return sorted(found, key=lambda delivery: -delivery.turn)

    def __reduce__(self) -> Any:
        """Copy and pickle as an object without iterations: they belong to loops of this process."""
        return Deliveries, ()
