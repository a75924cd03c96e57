"""The loggers of a `Runtime`: rank 0 writes, every rank checks, and all loggers get the same numbers and steps."""

from __future__ import annotations

import logging
import operator
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from nucleate.errors import ConfigurationError, UsageError
from nucleate.loggers.base import Logger
from nucleate.loggers.scalars import refuse_unreadable, to_scalars

_log = logging.getLogger(__name__)


class Ranks(Protocol):
    """The collectives that a group of loggers needs."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return rank `src`'s object on every rank."""

    def all_or_none(self, what: str) -> AbstractContextManager[None]:
        """Surround work that every rank must finish."""


class LoggerGroup:
    """The loggers of a run.

    At the end of the process, or when the runtime goes, each logger's `finalize` is called on rank 0, with `"failed"`
    if an exception ended the program.

    Args:
        choice: A logger or a list of them. A logger is a name, a `Logger`, or any object with the method
            `log_metrics(metrics, step)`.
        create: Builds the logger that a name stands for.
        writes: Whether this process writes.

    Raises:
        ConfigurationError: An object cannot log metrics.
    """

    def __init__(self, choice: Any, create: Callable[[str], Any], writes: bool) -> None:
        given = list(choice) if isinstance(choice, (list, tuple)) else [choice]
        for logger in given:
            _check(logger)
        self.loggers = [create(logger) if isinstance(logger, str) else logger for logger in given]
        self._writes = writes
        self._next_step: int | None = None
        for logger in self.loggers:
            if isinstance(logger, Logger):
                logger.writes = writes
        if writes:
            weakref.finalize(self, _finalize, self.loggers)

    def connect(self, ranks: Ranks) -> None:
        """Give all ranks the places that the loggers of rank 0 have claimed. Every rank calls this method."""
        claimed: list[Any] = []
        with ranks.all_or_none("claiming places for the loggers"):
            if self._writes:
                claimed = [logger.claim() if isinstance(logger, Logger) else None for logger in self.loggers]
        claimed = ranks.broadcast(claimed)
        if not self._writes:
            for logger, place in zip(self.loggers, claimed, strict=True):
                if isinstance(logger, Logger) and place is not None:
                    logger.follow(place)

    def log(self, metrics: Any, step: int | None) -> None:
        """Write metrics by each logger.

        Args:
            metrics: Numbers by name.
            step: The number of the step. None takes the step after the last one.

        Raises:
            UsageError: A metric is a tensor of several elements or the like, or the step is not an integer.
        """
        refuse_unreadable(metrics)
        number = None if step is None else _index(step)
        if not self._writes:
            return
        step = self._after_last() if number is None else number
        scalars = to_scalars(metrics)
        for logger in self.loggers:
            logger.log_metrics(scalars, step)
        self._next_step = step + 1

    def _after_last(self) -> int:
        if self._next_step is None:
            ours = (logger.next_step for logger in self.loggers if isinstance(logger, Logger))
            self._next_step = max(ours, default=0)
        return self._next_step


def _check(logger: Any) -> None:
    if isinstance(logger, str):
        return
    if isinstance(logger, type):
        raise ConfigurationError(f"loggers={logger.__name__} is a class. Give an object: {logger.__name__}(...).")
    if not callable(getattr(logger, "log_metrics", None)):
        raise ConfigurationError(
            f"loggers={logger!r:.200}: {type(logger).__name__} has no method log_metrics(metrics, step). Give a name "
            "('csv', 'tensorboard', 'wandb', 'mlflow'), an object of nucleate.loggers or of Lightning Fabric, or any "
            "object with this method."
        )


def _index(step: Any) -> int:
    try:
        return operator.index(step)
    except TypeError as error:
        raise UsageError(f"step={step!r:.200} must be an integer, or None to count.") from error


def _finalize(loggers: Sequence[Any]) -> None:
    # The interpreter sets this when it prints the exception that ends the program.
    status = "failed" if getattr(sys, "last_value", None) is not None else "success"
    for logger in loggers:
        finalize = getattr(logger, "finalize", None)
        if not callable(finalize):
            continue
        try:
            finalize(status)
        except Exception as error:
            # The program ends here. An error of one logger must not keep the others from ending.
            _log.warning("%s.finalize(%r) failed: %s: %s", type(logger).__name__, status, type(error).__name__, error)
