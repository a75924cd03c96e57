"""The base class of loggers, and the guard of methods that only the writing process runs."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, TypeVar, cast

F = TypeVar("F", bound=Callable[..., None])


class Logger(ABC):
    """A place where the metrics of a run are written.

    Required: `log_metrics`. Everything else has a working default. `Runtime` also takes objects of other classes that
    have this method, such as the loggers of Lightning Fabric.

    A logger opens files and connections at the first write, not in its constructor, because every rank constructs it.
    """

    kind: ClassVar[str] = "logger"
    #: Whether this process writes. `Runtime` sets it to False on every rank but rank 0.
    writes: bool = True

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Build the logger that is registered under `name`, with its default options.

        Args:
            name: The registered name.
        """
        return cls()

    @property
    def name(self) -> str | None:
        """The name of the experiment."""
        return None

    @property
    def version(self) -> int | str | None:
        """The number or the name of this run of the experiment."""
        return None

    @property
    def root_dir(self) -> str | None:
        """The folder of all experiments, or None for a logger that has no folder."""
        return None

    @property
    def log_dir(self) -> str | None:
        """The folder of this run, or None for a logger that has no folder."""
        return None

    @property
    def next_step(self) -> int:
        """The step after the last one that an earlier run has logged to the same place. By default 0."""
        return 0

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write metrics.

        Args:
            metrics: Numbers by name.
            step: The number of the step. `Runtime` always gives it.
        """

    def log_hyperparams(self, params: Any) -> None:
        """Write the settings of the run. By default, do nothing.

        Args:
            params: A dict, a dataclass or an `argparse.Namespace`, which may be nested.
        """

    def save(self) -> None:
        """Write everything that the logger still holds. By default, do nothing."""

    def finalize(self, status: str) -> None:
        """End the run. The logger writes everything that it still holds.

        Args:
            status: `"success"`, or `"failed"` after an error.
        """
        self.save()

    def claim(self) -> Any:
        """Take a place for this run, and return a value that `follow` needs. Only rank 0 calls this method.

        By default, do nothing.
        """
        return None

    def follow(self, claimed: Any) -> None:
        """Take over the place that rank 0 has claimed. The other ranks call this method. By default, do nothing.

        Args:
            claimed: The result of `claim` on rank 0, pickled.
        """


def by_writer(method: F) -> F:
    """Let a method of a logger do nothing on ranks that do not write."""

    @functools.wraps(method)
    def guarded(self: Logger, *args: Any, **kwargs: Any) -> None:
        if self.writes:
            method(self, *args, **kwargs)

    return cast(F, guarded)


class Silent:
    """A stand-in for the object of another library, on ranks that do not write: each of its methods does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None

    def __getitem__(self, _: Any) -> Silent:
        return self

    def __setitem__(self, _: Any, __: Any) -> None:
        """Do nothing."""
