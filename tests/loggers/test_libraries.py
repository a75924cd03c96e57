"""The adapters with the real libraries, and without them."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nucleate import Runtime
from nucleate.errors import MissingDependencyError, UsageError
from nucleate.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

# The libraries warn of what they will change.
pytestmark = pytest.mark.filterwarnings("ignore")


def log_a_run(logger: Logger) -> None:
    runtime = Runtime(accelerator="cpu", loggers=logger)
    runtime.logger.log_hyperparams({"lr": 0.1, "model": {"width": 64, "kind": None}})
    runtime.log("loss", torch.tensor(0.5))
    runtime.log_dict({"loss": 0.25, "acc": 1}, step=5)
    logger.finalize("success")


@pytest.mark.needs("tensorboard")
def test_tensorboard_reads_the_metrics_and_the_settings(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, "exp", prefix="t", flush_secs=1)
    assert logger.log_dir == str(tmp_path / "exp" / "version_0")
    log_a_run(logger)
    found = EventAccumulator(logger.log_dir).Reload()
    assert [(event.step, event.value) for event in found.Scalars("t-loss")] == [(0, 0.5), (5, 0.25)]
    assert [event.step for event in found.Scalars("t-acc")] == [5]
    assert "_hparams_/session_start_info" in found.PluginTagToContent("hparams")


@pytest.mark.needs("tensorboard")
def test_tensorboard_takes_curves_and_refuses_texts(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"losses": {"train": 1.0, "val": 2.0}})
    with pytest.raises(UsageError, match="'note'.*TensorBoard takes numbers"):
        logger.log_metrics({"note": "text"})
    logger.experiment.add_text("note", "text")
    logger.finalize("success")
    assert {path.name for path in Path(logger.log_dir).iterdir() if path.is_dir()} == {"losses_train", "losses_val"}


@pytest.mark.needs("wandb")
def test_wandb_gets_the_metrics_and_the_settings(tmp_path: Path) -> None:
    logger = WandbLogger(project="p", name="n", save_dir=tmp_path, offline=True, settings=_quiet())
    log_a_run(logger)
    (file,) = tmp_path.rglob("run-*.wandb")
    rows, settings = _wandb_history(file)
    assert [(row["global_step"], row["loss"]) for row in rows] == [("0", "0.5"), ("5", "0.25")]
    assert rows[1]["acc"] == "1"
    assert {"lr", "model/width", "model/kind"} <= settings
    assert (logger.name, logger.version) == ("n", file.stem.removeprefix("run-"))


@pytest.mark.needs("mlflow")
def test_mlflow_gets_the_metrics_and_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without it MLflow asks for a database, and for packages that read one.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("exp", "run", tracking_uri=f"file:{tmp_path}", tags={"kind": "test"})
    log_a_run(logger)
    run = logger.experiment.get_run(logger.version)
    assert run.data.params == {"lr": "0.1", "model/width": "64", "model/kind": "None"}
    assert run.info.status == "FINISHED"
    assert run.data.tags["kind"] == "test"
    history = logger.experiment.get_metric_history(logger.version, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(0, 0.5), (5, 0.25)]
    again = MLFlowLogger("exp", tracking_uri=f"file:{tmp_path}", run_id=logger.version)
    again.log_metrics({"loss": 0.125}, 6)
    again.finalize("failed")
    assert again.experiment.get_run(logger.version).info.status == "FAILED"


def _loggers(folder: Path) -> list[Logger]:
    return [
        CSVLogger(folder),
        TensorBoardLogger(folder),
        WandbLogger(save_dir=folder, offline=True),
        MLFlowLogger(tracking_uri=f"file:{folder}"),
    ]


@pytest.mark.needs("tensorboard")
@pytest.mark.needs("wandb")
@pytest.mark.needs("mlflow")
def test_a_rank_that_does_not_write_opens_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    for logger in _loggers(folder):
        logger.writes = False
        log_methods: list[Callable[[], Any]] = [
            lambda logger=logger: logger.log_metrics({"loss": 1.0}),  # type: ignore[misc]
            lambda logger=logger: logger.log_hyperparams({"lr": 1.0}),  # type: ignore[misc]
            logger.save,
            lambda logger=logger: logger.finalize("success"),  # type: ignore[misc]
        ]
        for method in log_methods:
            method()
        if not isinstance(logger, CSVLogger):
            logger.experiment.add_text("note", "text")  # type: ignore[attr-defined]
    assert not folder.exists()


@pytest.mark.parametrize(
    ("logger", "package"), [(TensorBoardLogger, "tensorboard"), (WandbLogger, "wandb"), (MLFlowLogger, "mlflow")]
)
def test_a_missing_library_is_an_error_with_the_command_that_installs_it(
    logger: type[Logger], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Absent:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == package:
                raise ModuleNotFoundError(name)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(MissingDependencyError, match=rf"pip install nucleate\[{package}\]"):
        Runtime(accelerator="cpu", loggers=package)


def _quiet() -> Any:
    import wandb

    return wandb.Settings(silent=True, console="off", x_disable_stats=True)


def _wandb_history(file: Path) -> tuple[list[dict[str, str]], set[str]]:
    """Read the rows and the names of settings from a file that `wandb sync` uploads."""
    from wandb.proto import wandb_internal_pb2

    rows, settings = [], set()
    for data in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): item.value_json for item in items})
        for update in record.config.update:
            settings.add(update.key or "/".join(update.nested_key))
    return rows, settings


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format: sum, length and type before each piece of one."""
    position, whole = 7, b""
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""
