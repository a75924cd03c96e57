"""The logs of a runtime: its loggers, and the methods that write metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nucleate.errors import UsageError
from nucleate.runtime.parts import Parts


class Logs(Parts):
    """The methods of a `Runtime` that write metrics."""

    @property
    def loggers(self) -> list[Any]:
        """The loggers that the runtime was given."""
        return [] if self._loggers is None else list(self._loggers.loggers)

    @property
    def logger(self) -> Any:
        """The first logger.

        Raises:
            UsageError: The runtime was not given a logger.
        """
        if not self.loggers:
            raise UsageError("this runtime has no logger. Give it one, as in Runtime(loggers='csv').")
        return self.loggers[0]

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Write a metric by each logger, on rank 0. See `log_dict`."""
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write metrics by each logger, on rank 0. The values are rank 0's; `all_reduce` averages over the ranks.

        Args:
            metrics: Numbers by name. Tensors of one element become numbers. Other values are passed to the loggers.
            step: The number of the step. None takes the step after the last one that was logged.

        Raises:
            UsageError: A tensor has several elements, or `step` is not an integer.
        """
        if self._loggers is not None:
            self._loggers.log(metrics, step)
