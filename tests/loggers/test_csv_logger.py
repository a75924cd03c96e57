from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nucleate.errors import ConfigurationError, UsageError
from nucleate.loggers import CSVLogger


def rows(path: str | Path) -> list[dict[str, str]]:
    with open(Path(path) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_each_call_is_a_row_that_is_in_the_file_at_once(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": torch.tensor(0.1, dtype=torch.float64), "tokens": torch.tensor(7)}, step=3)
    assert rows(logger.log_dir) == [{"step": "3", "loss": "0.1", "tokens": "7"}]
    assert logger.log_dir == str(tmp_path / "version_0")


def test_a_column_that_comes_later_is_added_and_no_row_is_lost(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, "exp", prefix="train")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.log_metrics({"acc, top 1": 0.5, "lr": 0.01}, 1)
    logger.log_metrics({"loss": 0.5}, 2)
    assert rows(tmp_path / "exp" / "version_0") == [
        {"step": "0", "train-loss": "1.0", "train-acc, top 1": "", "train-lr": ""},
        {"step": "1", "train-loss": "", "train-acc, top 1": "0.5", "train-lr": "0.01"},
        {"step": "2", "train-loss": "0.5", "train-acc, top 1": "", "train-lr": ""},
    ]


def test_numbers_that_are_not_finite_can_be_read_back_and_differ_from_missing_ones(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": math.nan, "b": math.inf, "c": torch.tensor(-math.inf)})
    logger.log_metrics({"a": 1})
    first, second = rows(logger.log_dir)
    assert math.isnan(float(first["a"]))
    assert (float(first["b"]), float(first["c"])) == (math.inf, -math.inf)
    assert (second["b"], second["c"]) == ("", "")


def test_a_step_that_is_not_given_counts(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    for step in (None, None, 10, None):
        logger.log_metrics({"loss": 1.0}, step)
    assert [row["step"] for row in rows(logger.log_dir)] == ["0", "1", "10", "11"]


def test_a_metric_called_step_does_not_take_the_place_of_the_step(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"step": 4, "loss": 1.0}, step=16)
    assert rows(logger.log_dir) == [{"step": "16", "loss": "1.0", "step_metric": "4"}]


def test_a_new_run_gets_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "version_7").mkdir()
    (tmp_path / "version_old").mkdir()
    for expected in (8, 9):
        logger = CSVLogger(tmp_path)
        logger.log_metrics({"loss": 1.0})
        assert logger.version == expected
    assert len(rows(tmp_path / "version_8")) == 1


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda _: CSVLogger(tmp_path).version, range(32)))
    assert sorted(versions) == list(range(32))


@pytest.mark.parametrize("version", [3, "resumed"])
def test_a_run_with_a_version_that_is_there_continues_the_file(tmp_path: Path, version: int | str) -> None:
    first = CSVLogger(tmp_path, version=version)
    first.log_metrics({"loss": 1.0}, 4)
    first.finalize("success")
    second = CSVLogger(tmp_path, version=version)
    second.log_metrics({"loss": 0.5, "acc": 0.1})
    assert rows(second.log_dir) == [
        {"step": "4", "loss": "1.0", "acc": ""},
        {"step": "5", "loss": "0.5", "acc": "0.1"},
    ]


@pytest.mark.parametrize("torn", [b"step,loss\n1,0.5\n2,0.2", b"step,lo", b""])
def test_a_line_that_a_killed_run_has_not_finished_is_removed(tmp_path: Path, torn: bytes) -> None:
    folder = tmp_path / "version_0"
    folder.mkdir()
    (folder / "metrics.csv").write_bytes(torn)
    logger = CSVLogger(tmp_path, version=0)
    logger.log_metrics({"loss": 0.25}, 2)
    kept = [{"step": "1", "loss": "0.5"}] if b"0.5" in torn else []
    assert rows(folder) == [*kept, {"step": "2", "loss": "0.25"}]


def test_a_killed_process_leaves_every_row_that_it_has_logged(tmp_path: Path) -> None:
    program = """
import sys
from nucleate.loggers import CSVLogger
logger = CSVLogger(sys.argv[1])
for step in range(10**9):
    # Now and then a new column, so that the file is written anew.
    logger.log_metrics({"loss": step / 7, f"column {step // 50}": step}, step)
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) > 400:
            process.send_signal(signal.SIGKILL)
            break
    printed = [int(line) for line in process.stdout]
    process.wait(60)
    process.stdout.close()
    found = rows(tmp_path / "version_0")
    assert [int(row["step"]) for row in found] == list(range(len(found)))
    assert len(found) > max(printed, default=400)
    assert all(float(row["loss"]) == int(row["step"]) / 7 for row in found)


def test_a_rewrite_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)

    def fail(*_: object) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            logger.log_metrics({"acc": 1.0}, 1)
    assert rows(logger.log_dir) == [{"step": "0", "loss": "1.0"}]
    logger.log_metrics({"acc": 1.0}, 2)
    assert [row["step"] for row in rows(logger.log_dir)] == ["0", "2"]


def test_settings_are_written_beside_the_metrics(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_hyperparams(Namespace(lr=0.1, model={"width": 64, "dtype": torch.bfloat16}, name=None))
    written = json.loads(Path(logger.log_dir, "hparams.json").read_text())
    assert written == {"lr": 0.1, "model/width": 64, "model/dtype": "torch.bfloat16", "name": None}


def test_a_logger_touches_no_file_before_the_first_write(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "new")
    logger.save()
    logger.finalize("success")
    assert not (tmp_path / "new").exists()


def test_a_logger_can_be_used_after_it_has_ended(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    for step in range(2):
        logger.log_metrics({"loss": 1.0}, step)
        logger.finalize("success")
    assert len(rows(logger.log_dir)) == 2


def test_metrics_that_are_not_numbers_are_refused_by_name(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    for value, words in [("high", "'high'"), (torch.ones(3), r"shape \(3,\)"), (torch.tensor(1j), "complex")]:
        with pytest.raises(UsageError, match=f"metric 'quality'.*{words}"):
            logger.log_metrics({"loss": 1.0, "quality": value})
    assert not list(tmp_path.rglob("metrics.csv"))


@pytest.mark.parametrize("options", [{"version": -1}, {"version": True}, {"flush_logs_every_n_steps": 0}])
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        CSVLogger(tmp_path, **options)
