"""Gradient accumulation: micro-batches are counted, and the last one of each group makes a step.

This file decides which micro-batch is the last one, by which number losses are divided, and which optimizers wait. The
strategy decides how gradients stay unexchanged until then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nucleate.errors import ConfigurationError, UsageError
from nucleate.layout import LiveLayout
from nucleate.wrappers.deliveries import Deliveries


@dataclass(eq=False)
class _Group:
    """The micro-batches of one step of some models.

    Attributes:
        size: The number of micro-batches, as far as it is known when the group begins. It divides each loss.
        count: The number of micro-batches, with the present one.
        is_last: Whether the present one is the last.
        has_gradients: Whether there may be gradients that the next step needs.
        scaled: The optimizers whose gradients were scaled, because the group was shorter than its size.
        stepped: The optimizers that have made their step.
    """

    size: int
    count: int = 0
    is_last: bool = False
    has_gradients: bool = False
    scaled: WeakSet[Optimizer] = field(default_factory=WeakSet)
    stepped: WeakSet[Optimizer] = field(default_factory=WeakSet)


@dataclass(eq=False)
class _Counter:
    """The count of some models that train together.

    Attributes:
        models: The models, without shells.
        group: The group that has begun, or None between two groups.
        turn: The number of batches that all loaders together had delivered when the last block ended.
    """

    models: WeakSet[nn.Module]
    group: _Group | None = None
    turn: int = 0


@final
class Accumulation:
    """The accumulation of gradients of one runtime.

    Args:
        deliveries: The loops over the runtime's loaders.
        models: All models that were set up, without shells.
    """

    def __init__(self, deliveries: Deliveries, models: WeakSet[nn.Module]) -> None:
        self._deliveries = deliveries
        self._all_models = models
        self._counters: WeakKeyDictionary[nn.Module, _Counter] = WeakKeyDictionary()
        self._open: _Counter | None = None

    @contextmanager
    def micro_batch(self, models: Sequence[nn.Module], every: int, last: bool | None) -> Iterator[bool]:
        """Surround one micro-batch. Yield whether it is the last one of its group.

        Args:
            models: The models, without shells.
            every: The number of micro-batches of a group.
            last: See `Runtime.accumulate`.

        Raises:
            ConfigurationError: `every` is not a positive integer.
            UsageError: The block is inside another one, the models are counted apart, or several blocks share a batch.
        """
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigurationError(f"accumulate(every={every!r}): give an integer of at least 1.")
        if self._open is not None:
            raise UsageError("accumulate() inside another accumulate(): name all models in one of them.")
        counter = self._counter(models)
        remaining = self._remaining(counter, last)
        group = counter.group
        if group is None:
            group = counter.group = _Group(every if remaining is None else min(every, remaining + 1))
        group.count += 1
        group.is_last = last is True or remaining == 0 or group.count >= group.size
        self._open = counter
        try:
            yield group.is_last
        except BaseException:
            # This micro-batch did not happen, and the next one takes its place.
            group.count -= 1
            raise
        finally:
            self._open = None
        group.has_gradients = True
        if group.is_last:
            counter.group = None
        counter.turn = self._deliveries.turn

    def divided(self, loss: Tensor) -> Tensor:
        """Return a loss divided by the number of micro-batches of the group, inside a block; else the loss."""
        group = self._group
        if group is None:
            return loss
        group.has_gradients = True
        return loss if group.size == 1 else loss / group.size

    def holds(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer waits for the last micro-batch of the open block."""
        group = self._group
        return group is not None and not group.is_last and self._trains(optimizer)

    def hold_step(self, optimizer: Optimizer, closure: Any) -> bool:
        """Return whether a step does nothing. If not, prepare the gradients for it.

        Args:
            optimizer: The user's optimizer.
            closure: The argument of the step.

        Raises:
            UsageError: There is a closure, which computes gradients of its own.
        """
        group = self._group
        if group is None or not self._trains(optimizer):
            return False
        if closure is not None:
            raise UsageError(
                "optimizer.step(closure) inside accumulate(): the closure computes the gradients itself. Accumulate "
                "inside the closure, and leave accumulate() out."
            )
        group.has_gradients = True
        if group.is_last:
            self.complete(optimizer)
            group.stepped.add(optimizer)
        return not group.is_last

    def keeps_gradients(self, optimizer: Optimizer) -> bool:
        """Return whether `zero_grad` does nothing, because the next step needs the gradients."""
        group = self._group
        if group is None or not group.has_gradients or not self._trains(optimizer):
            return False
        return not (group.is_last and optimizer in group.stepped)

    @torch.no_grad()
    def complete(self, optimizer: Optimizer) -> None:
        """Make gradients of a group that is shorter than its size the average over its micro-batches, once."""
        group = self._group
        if group is None or group.count == group.size or optimizer in group.scaled or not self._trains(optimizer):
            return
        group.scaled.add(optimizer)
        for parameters in optimizer.param_groups:
            for parameter in parameters["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(group.size / group.count)

    @property
    def _group(self) -> _Group | None:
        return None if self._open is None else self._open.group

    def _counter(self, models: Sequence[nn.Module]) -> _Counter:
        counter = self._counters.get(models[0])
        apart = any(self._counters.get(model) is not counter for model in models)
        if apart or (counter is not None and set(counter.models) != set(models)):
            raise UsageError(
                "accumulate() has counted some of these models apart, or together with others. Name the same models "
                "in each call."
            )
        if counter is None:
            counter = _Counter(WeakSet(models))
            self._counters.update(dict.fromkeys(models, counter))
        return counter

    def _remaining(self, counter: _Counter, last: bool | None) -> int | None:
        """Return how many batches are left after the present one, or None where nobody knows."""
        if last is not None:
            return None
        running = self._deliveries.open()
        fresh = [delivery for delivery in running if delivery.turn > counter.turn]
        if running and not fresh:
            raise UsageError(
                "accumulate(): the loop over a data loader has not delivered a batch since the last block, so this "
                "block cannot know whether it has the last one. Pass last=False if you split the batches of the loader "
                "into micro-batches: then the count alone decides. Otherwise get the batch before the block."
            )
        return min((left for delivery in fresh if (left := delivery.remaining) is not None), default=None)

    def _trains(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer has parameters of the open block's models, or only parameters of no model."""
        assert self._open is not None
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        mine = set(self._open.models)
        if any(own & LiveLayout.of(model).ids for model in mine):
            return True
        return not any(own & LiveLayout.of(model).ids for model in self._all_models if model not in mine)
