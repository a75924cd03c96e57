"""The logger that writes files for TensorBoard, through `torch.utils.tensorboard`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from nucleate.loggers.base import Logger, Silent, by_writer
from nucleate.loggers.hyperparams import flatten
from nucleate.loggers.optional_package import require
from nucleate.loggers.scalars import to_numbers, to_scalars, with_prefix
from nucleate.loggers.version_folder import VersionFolder


@final
class TensorBoardLogger(Logger):
    """A logger that writes to `root_dir/name/version` with `torch.utils.tensorboard.SummaryWriter`.

    Args:
        root_dir: The folder of all experiments.
        name: The name of the experiment, a folder inside `root_dir`. None leaves this folder out.
        version: A number or the name of the folder of this run. None takes the next free number.
        prefix: The text before the name of each metric.
        sub_dir: A folder inside the folder of this run.
        options: Arguments of `SummaryWriter`, such as `flush_secs`.

    Raises:
        MissingDependencyError: tensorboard is not installed.
        ConfigurationError: `version` is not a number of at least 0 or the name of a folder.
    """

    def __init__(
        self,
        root_dir: str | os.PathLike[str] = "logs",
        name: str | None = None,
        version: int | str | None = None,
        prefix: str = "",
        sub_dir: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        require("tensorboard", type(self).__name__)
        self._folder = VersionFolder(root_dir, name, version)
        self._prefix = prefix
        self._sub_dir = sub_dir
        self._options = options
        self._writer: Any = None
        self._count = 0

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return self._folder.name

    @property
    def version(self) -> int | str:
        """The number or the name of this run."""
        return self._folder.version(self.writes)

    @property
    def root_dir(self) -> str:
        """The folder of all experiments."""
        return self._folder.root_dir

    @property
    def log_dir(self) -> str:
        """The folder of this run."""
        return str(Path(self._folder.path(self.writes), self._sub_dir or ""))

    @property
    def experiment(self) -> Any:
        """The `SummaryWriter`. On ranks that do not write, each of its methods does nothing."""
        if not self.writes:
            return Silent()
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(log_dir=self.log_dir, **self._options)
        return self._writer

    @by_writer
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write metrics. A value that is a dict of numbers becomes one chart with several curves.

        Args:
            metrics: Numbers by name, or tensors of one element.
            step: The number of the step. None counts the calls.

        Raises:
            UsageError: A value is not a number.
        """
        step = self._count if step is None else step
        scalars = to_scalars(metrics)
        curves = {name: value for name, value in scalars.items() if isinstance(value, Mapping)}
        numbers = {name: value for name, value in scalars.items() if name not in curves}
        for name, number in to_numbers(numbers, self._prefix, "TensorBoard").items():
            self.experiment.add_scalar(name, number, step)
        for name, values in curves.items():
            self.experiment.add_scalars(with_prefix(name, self._prefix), to_numbers(values, "", "TensorBoard"), step)
        self._count = step + 1

    @by_writer
    def log_hyperparams(self, params: Any, metrics: Mapping[str, Any] | None = None, step: int | None = None) -> None:
        """Write the settings of the run for TensorBoard's page of hyperparameters.

        Args:
            params: A dict, a dataclass or an `argparse.Namespace`.
            metrics: The metrics that the page shows beside the settings. TensorBoard needs one, so the default is
                `hp_metric`, which is -1.
            step: The number of the step of these metrics.
        """
        from torch.utils.tensorboard.summary import hparams

        shown = dict(metrics) if metrics else {"hp_metric": -1}
        values = {name: "None" if value is None else value for name, value in flatten(params).items()}
        self.log_metrics(shown, 0 if step is None else step)
        for summary in hparams(values, to_numbers(shown, self._prefix, "TensorBoard")):
            self.experiment.file_writer.add_summary(summary)

    @by_writer
    def save(self) -> None:
        """Write everything that the writer still holds."""
        if self._writer is not None:
            self._writer.flush()

    @by_writer
    def finalize(self, status: str) -> None:
        """Write everything that the writer still holds, and close it."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def claim(self) -> int | str:
        """Make the folder of this run, and return its version."""
        return self._folder.claim()

    def follow(self, claimed: int | str) -> None:
        """Take the version that rank 0 has claimed."""
        self._folder.follow(claimed)
