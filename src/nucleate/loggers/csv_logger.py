"""The logger that writes a CSV file in a folder of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, final

from nucleate.errors import ConfigurationError
from nucleate.loggers.base import Logger, by_writer
from nucleate.loggers.csv_file import CSVFile
from nucleate.loggers.hyperparams import flatten
from nucleate.loggers.scalars import to_numbers
from nucleate.loggers.version_folder import VersionFolder


@final
class CSVLogger(Logger):
    """A logger that writes `root_dir/name/version/metrics.csv`.

    Each call of `log_metrics` writes a row at once, so a killed process loses nothing. The column `step` comes first;
    the others follow in the order in which their metrics first came. A cell is empty if its row has no such metric. A
    metric that is called `step` itself gets the column `step_metric`.

    A run that continues an earlier one passes its `version`: rows are then added to the same file. Steps that it
    repeats are in the file twice, and the later row counts.

    Args:
        root_dir: The folder of all experiments.
        name: The name of the experiment, a folder inside `root_dir`. None leaves this folder out.
        version: A number or the name of the folder of this run. None takes the next free number. A folder that is there
            is continued, never overwritten.
        prefix: The text before the name of each metric.
        flush_logs_every_n_steps: After how many rows the file is forced to the disk, so that they also survive a crash
            of the machine.

    Raises:
        ConfigurationError: `flush_logs_every_n_steps` or `version` is out of range.
    """

    def __init__(
        self,
        root_dir: str | os.PathLike[str] = "logs",
        name: str | None = None,
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        number = flush_logs_every_n_steps
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ConfigurationError(f"flush_logs_every_n_steps={number!r} must be an integer of at least 1.")
        self._folder = VersionFolder(root_dir, name, version)
        self._prefix = prefix
        self._sync_every = number
        self._opened: CSVFile | None = None
        self._next_step: int | None = None

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
        return str(self._folder.path(self.writes))

    @property
    def next_step(self) -> int:
        """The step after the last row of the file."""
        if self._next_step is None:
            last = self._file.last_row.get("step", "")
            self._next_step = int(last) + 1 if last.lstrip("-").isdecimal() else 0
        return self._next_step

    @by_writer
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write a row.

        Args:
            metrics: Numbers by name, or tensors of one element.
            step: The number of the step. None takes the next one.

        Raises:
            UsageError: A value is not a number.
        """
        numbers = to_numbers(metrics, self._prefix, "a CSV file")
        if "step" in numbers:
            numbers["step_metric"] = numbers.pop("step")
        step = self.next_step if step is None else step
        self._file.append({"step": step, **numbers})
        self._next_step = step + 1

    @by_writer
    def log_hyperparams(self, params: Any) -> None:
        """Write the settings of the run to `hparams.json`, in the place of earlier ones."""
        path = self._folder.path(writes=True) / "hparams.json"
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(json.dumps(flatten(params), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    @by_writer
    def save(self) -> None:
        """Force all rows to the disk."""
        if self._opened is not None:
            self._opened.sync()

    @by_writer
    def finalize(self, status: str) -> None:
        """Force all rows to the disk, and close the file. A later row opens it again."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def claim(self) -> int | str:
        """Make the folder of this run, and return its version."""
        return self._folder.claim()

    def follow(self, claimed: int | str) -> None:
        """Take the version that rank 0 has claimed."""
        self._folder.follow(claimed)

    @property
    def _file(self) -> CSVFile:
        if self._opened is None:
            self._opened = CSVFile(self._folder.path(writes=True) / "metrics.csv", self._sync_every)
        return self._opened
