"""The logger that writes to MLflow."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from itertools import islice
from typing import Any, final

from nucleate.loggers.base import Logger, Silent, by_writer
from nucleate.loggers.hyperparams import flatten
from nucleate.loggers.optional_package import require
from nucleate.loggers.scalars import to_numbers

#: MLflow takes at most this many settings in one call, and this many characters in each.
_MOST_PARAMS, _MOST_CHARACTERS = 100, 6000


@final
class MLFlowLogger(Logger):
    """A logger that writes to a run of MLflow. The run begins at the first write.

    Args:
        experiment_name: The name of the experiment, which is made if it does not exist.
        run_name: The name of the run.
        tracking_uri: The address of a server or of a database, such as `"sqlite:///mlflow.db"`. None takes MLflow's own
            setting.
        tags: Tags of the run.
        prefix: The text before the name of each metric.
        run_id: The id of a run to continue.

    Raises:
        MissingDependencyError: mlflow is not installed.
    """

    def __init__(
        self,
        experiment_name: str = "nucleate",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: Mapping[str, Any] | None = None,
        prefix: str = "",
        run_id: str | None = None,
    ) -> None:
        require("mlflow", type(self).__name__)
        self._experiment_name = experiment_name
        self._run_name = run_name
        self._tracking_uri = tracking_uri
        self._tags = dict(tags or {})
        self._prefix = prefix
        self._run_id = run_id
        self._client: Any = None
        self._count = 0

    @property
    def name(self) -> str:
        """The name of the experiment."""
        return self._experiment_name

    @property
    def version(self) -> str | None:
        """The id of the run, or None before the run has begun."""
        return self._run_id

    @property
    def experiment(self) -> Any:
        """The `MlflowClient`. On ranks that do not write, each of its methods does nothing."""
        if not self.writes:
            return Silent()
        if self._client is None:
            self._client = import_module("mlflow").MlflowClient(self._tracking_uri)
        if self._run_id is None:
            found = self._client.get_experiment_by_name(self._experiment_name)
            experiment_id = found.experiment_id if found else self._client.create_experiment(self._experiment_name)
            run = self._client.create_run(experiment_id, run_name=self._run_name, tags=self._tags)
            self._run_id = run.info.run_id
        return self._client

    @by_writer
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write metrics.

        Args:
            metrics: Numbers by name, or tensors of one element.
            step: The number of the step. None counts the calls.

        Raises:
            UsageError: A value is not a number.
        """
        step = self._count if step is None else step
        numbers = to_numbers(metrics, self._prefix, "MLflow")
        entities = import_module("mlflow.entities")
        now_ms = int(time.time() * 1000)
        values = [entities.Metric(name, float(number), now_ms, step) for name, number in numbers.items()]
        self.experiment.log_batch(self._run_id, metrics=values)
        self._count = step + 1

    @by_writer
    def log_hyperparams(self, params: Any) -> None:
        """Write the settings of the run as its parameters."""
        entities = import_module("mlflow.entities")
        texts = ((name, str(value)[:_MOST_CHARACTERS]) for name, value in flatten(params).items())
        made = (entities.Param(name, text) for name, text in texts)
        for some in _batches(made):
            self.experiment.log_batch(self._run_id, params=some)

    @by_writer
    def finalize(self, status: str) -> None:
        """End the run."""
        if self._run_id is not None and self._client is not None:
            self._client.set_terminated(self._run_id, "FINISHED" if status == "success" else "FAILED")


def _batches(items: Iterator[Any]) -> Iterator[list[Any]]:
    while some := list(islice(items, _MOST_PARAMS)):
        yield some
