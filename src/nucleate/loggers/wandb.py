"""The logger that writes to Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any, final

from nucleate.loggers.base import Logger, Silent, by_writer
from nucleate.loggers.hyperparams import flatten
from nucleate.loggers.optional_package import require
from nucleate.loggers.scalars import to_scalars, with_prefix

#: The metric that charts have as their horizontal axis. `wandb` refuses to go back in its own count of steps, and then
#: drops the values. A resumed run goes back.
_STEP = "global_step"


@final
class WandbLogger(Logger):
    """A logger that writes to a run of Weights & Biases. The run begins at the first write.

    Values that are not numbers, such as `wandb.Image`, are passed on.

    Args:
        project: The project.
        name: The name that is shown for the run.
        save_dir: The folder for wandb's files.
        version: The id of the run. An id that exists is resumed.
        offline: Write files only, which `wandb sync` uploads later.
        prefix: The text before the name of each metric.
        experiment: A run that has begun already, as `wandb.init` returns it.
        options: Arguments of `wandb.init`, such as `entity`, `group` or `tags`.

    Raises:
        MissingDependencyError: wandb is not installed.
    """

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        save_dir: str | os.PathLike[str] | None = None,
        version: str | None = None,
        offline: bool = False,
        prefix: str = "",
        experiment: Any = None,
        **options: Any,
    ) -> None:
        require("wandb", type(self).__name__)
        self._prefix = prefix
        self._run = experiment
        self._save_dir = None if save_dir is None else os.fspath(save_dir)
        given = {"project": project, "name": name, "dir": self._save_dir, "id": version}
        self._options = {key: value for key, value in given.items() if value is not None}
        self._options.setdefault("resume", "allow")
        if offline:
            self._options["mode"] = "offline"
        self._options.update(options)
        self._has_axis = False
        self._count = 0

    @property
    def name(self) -> str | None:
        """The name that is shown for the run."""
        name: str | None = self._options.get("name") if self._run is None else self._run.name
        return name

    @property
    def version(self) -> str | None:
        """The id of the run, or None before the run has begun."""
        version: str | None = self._options.get("id") if self._run is None else self._run.id
        return version

    @property
    def root_dir(self) -> str | None:
        """The folder for wandb's files."""
        return self._save_dir

    @property
    def experiment(self) -> Any:
        """The run of wandb. On ranks that do not write, each of its methods does nothing."""
        if not self.writes:
            return Silent()
        if self._run is None:
            if self._save_dir is not None:
                os.makedirs(self._save_dir, exist_ok=True)
            self._run = import_module("wandb").init(**self._options)
        if not self._has_axis:
            self._has_axis = True
            self._run.define_metric(_STEP)
            self._run.define_metric("*", step_metric=_STEP)
        return self._run

    @by_writer
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write metrics, and the step as the metric `global_step`.

        Args:
            metrics: Numbers by name, tensors of one element, or objects of wandb.
            step: The number of the step. None counts the calls.

        Raises:
            UsageError: A tensor has several elements.
        """
        step = self._count if step is None else step
        values = {with_prefix(name, self._prefix): value for name, value in to_scalars(metrics).items()}
        self.experiment.log({_STEP: step, **values})
        self._count = step + 1

    @by_writer
    def log_hyperparams(self, params: Any) -> None:
        """Add the settings to the configuration of the run."""
        self.experiment.config.update(flatten(params), allow_val_change=True)

    @by_writer
    def finalize(self, status: str) -> None:
        """End the run. A later write resumes it."""
        if self._run is not None:
            # A later write resumes the run.
            self._options.update(id=self._run.id, name=self._run.name)
            self._run.finish(exit_code=0 if status == "success" else 1)
            self._run, self._has_axis = None, False
