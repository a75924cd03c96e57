"""The loggers of a runtime: `loggers=`, `logger`, `log` and `log_dict`."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nucleate import Runtime
from nucleate.errors import ConfigurationError, PluginNotFoundError, UsageError
from nucleate.loggers import CSVLogger, Logger


class Recorder:
    """An object of somebody else that can log."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, Any], int]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
        self.seen.append((metrics, step))


class Continued(Logger):
    """A logger of an installed plugin, whose last run ended at step 6."""

    def __init__(self) -> None:
        self.steps: list[int | None] = []

    @property
    def next_step(self) -> int:
        return 7

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.steps.append(step)


def test_every_logger_gets_numbers_and_the_same_steps() -> None:
    first, second = Recorder(), Recorder()
    runtime = Runtime(accelerator="cpu", loggers=[first, second])
    runtime.log("loss", torch.tensor([[0.5]], requires_grad=True))
    runtime.log_dict({"n": torch.tensor(3), "f": np.float32(0.25), "a": np.ones(1), "text": "x"}, step=torch.tensor(10))
    runtime.log("loss", 1)
    assert first.seen == second.seen
    assert first.seen == [
        ({"loss": 0.5}, 0),
        ({"n": 3, "f": 0.25, "a": 1.0, "text": "x"}, 10),
        ({"loss": 1}, 11),
    ]
    assert all(type(value) in (int, float, str) for metrics, _ in first.seen for value in metrics.values())


def test_the_loggers_are_members_of_the_runtime() -> None:
    recorder = Recorder()
    runtime = Runtime(accelerator="cpu", loggers=recorder)
    assert runtime.loggers == [recorder]
    assert runtime.logger is recorder


@pytest.mark.parametrize("loggers", [None, [], ()])
def test_without_a_logger_logging_does_nothing(loggers: Any) -> None:
    runtime = Runtime(accelerator="cpu", loggers=loggers)
    runtime.log("loss", 1.0)
    assert runtime.loggers == []
    with pytest.raises(UsageError, match="no logger"):
        runtime.logger  # noqa: B018


def test_a_name_stands_for_a_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runtime = Runtime(accelerator="cpu", loggers="csv")
    runtime.log("loss", 1.0)
    assert isinstance(runtime.logger, CSVLogger)
    assert Path("logs/version_0/metrics.csv").read_text() == "step,loss\n0,1.0\n"
    runtime.logger.finalize("success")


def test_steps_count_on_from_those_of_an_earlier_run() -> None:
    logger = Continued()
    runtime = Runtime(accelerator="cpu", loggers=[Recorder(), logger])
    runtime.log("loss", 1.0)
    runtime.log("loss", 1.0)
    assert logger.steps == [7, 8]


@pytest.mark.parametrize("wrong", [3, object(), {"log": 1}, Recorder, CSVLogger, [Recorder(), 3]])
def test_an_object_that_cannot_log_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"loggers=.*(log_metrics|class)"):
        Runtime(accelerator="cpu", loggers=wrong)


def test_a_name_that_is_not_known_gets_a_suggestion() -> None:
    with pytest.raises(PluginNotFoundError, match="Did you mean 'wandb'"):
        Runtime(accelerator="cpu", loggers="wand")


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"grad": torch.ones(2, 3)}, r"'grad' is a tensor of shape \(2, 3\)"),
        ({"z": torch.tensor(1j)}, "'z' is complex"),
        ({"m": torch.ones(1, device="meta")}, "'m' is a meta tensor"),
        ({1: 2.0}, "name of a metric"),
        ([("loss", 1.0)], "a dict"),
    ],
)
def test_metrics_that_are_not_numbers_are_refused_before_any_logger_writes(metrics: Any, words: str) -> None:
    recorder = Recorder()
    runtime = Runtime(accelerator="cpu", loggers=recorder)
    with pytest.raises(UsageError, match=words):
        runtime.log_dict(metrics)
    with pytest.raises(UsageError, match=r"step=1\.5"):
        runtime.log("loss", 1.0, step=1.5)  # type: ignore[arg-type]
    assert recorder.seen == []


@pytest.mark.filterwarnings("ignore")
def test_loggers_of_lightning_fabric_fit(tmp_path: Path) -> None:
    fabric = pytest.importorskip("lightning_fabric.loggers")
    logger = fabric.CSVLogger(tmp_path)
    runtime = Runtime(accelerator="cpu", loggers=logger)
    runtime.log_dict({"loss": torch.tensor(0.5)})
    logger.save()
    assert Path(logger.log_dir, "metrics.csv").read_text().split() == ["loss,step", "0.5,0"]


PROGRAM = """
import sys
from nucleate import Runtime
class Ended:
    def log_metrics(self, metrics, step): pass
    def finalize(self, status): print("ended:", status, flush=True)
class Broken(Ended):
    def finalize(self, status): raise OSError("the network is gone")
runtime = Runtime(accelerator="cpu", loggers=[Broken(), Ended()])
{end}
"""


@pytest.mark.parametrize(("end", "status"), [("", "success"), ("del runtime", "success"), ("1 / 0", "failed")])
def test_each_logger_is_ended_with_the_program_even_if_another_one_fails(end: str, status: str) -> None:
    command = [sys.executable, "-c", PROGRAM.format(end=end)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n") == [f"ended: {status}", ""]
    assert "the network is gone" in done.stderr


def test_a_program_without_loggers_imports_none() -> None:
    program = (
        "import sys; from nucleate import Runtime; Runtime(accelerator='cpu'); print('nucleate.loggers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"


def test_rows_of_a_runtime_are_in_the_file_while_it_runs(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    runtime = Runtime(accelerator="cpu", loggers=logger)
    for step in range(3):
        runtime.log("loss", 1.0 / (step + 1))
    with open(Path(logger.log_dir, "metrics.csv"), newline="") as file:
        assert [row["loss"] for row in csv.DictReader(file)] == ["1.0", "0.5", str(1 / 3)]
