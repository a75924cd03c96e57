"""Old checkpoints go, the newest stays, and the pointer leads to what is whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nucleate.checkpoint import save
from nucleate.checkpoint.disk.folder import CheckpointFolder
from nucleate.checkpoint.disk.lock import SaveLock
from nucleate.checkpoint.disk.series import resolve
from nucleate.cluster import Communicator
from nucleate.errors import CheckpointError, CheckpointNotFoundError, ConfigurationError
from tests.checkpoint.test_writer import PLACES

pytestmark = pytest.mark.usefixtures("factories_on_device")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def listed(runs: Path) -> list[str]:
    return [item["name"] for item in json.loads((runs / "latest").read_text())["checkpoints"]]


def steps(runs: Path) -> list[str]:
    return sorted(name for name in os.listdir(runs) if name != "latest")


def save_steps(runs: Path, solo: Communicator, numbers: range, keep_last: Any = 2, **options: Any) -> None:
    for number in numbers:
        save(runs / f"step-{number}", {"t": torch.tensor(float(number))}, solo, keep_last=keep_last, **options)


@pytest.mark.parametrize(("name", "format"), PLACES)
def test_the_newest_are_kept(runs: Path, solo: Communicator, name: str, format: str | None) -> None:
    suffix = Path(name).suffix
    for number in range(5):
        save(runs / f"step-{number}{suffix}", {"a": torch.ones(1)}, solo, format=format, keep_last=2)
        newest = [f"step-{n}{suffix}" for n in range(max(0, number - 1), number + 1)]
        assert steps(runs) == newest == listed(runs)
        assert resolve(runs / "latest") == runs / f"step-{number}{suffix}"


def test_all_may_be_kept_with_a_pointer(runs: Path, solo: Communicator) -> None:
    save_steps(runs, solo, range(4), "all")
    assert len(steps(runs)) == 4
    assert resolve(runs / "latest") == runs / "step-3"


def test_without_keep_last_there_is_no_pointer_and_nothing_is_deleted(runs: Path, solo: Communicator) -> None:
    save_steps(runs, solo, range(3), None)
    assert steps(runs) == ["step-0", "step-1", "step-2"]
    assert not (runs / "latest").exists()


def test_what_was_saved_without_keep_last_is_never_deleted(runs: Path, solo: Communicator) -> None:
    save(runs / "step-0", {"a": 1}, solo)
    (runs / "thesis").mkdir()
    (runs / "thesis.pt").write_text("precious")
    save_steps(runs, solo, range(1, 5), 1)
    assert steps(runs) == ["step-0", "step-4", "thesis", "thesis.pt"]


@pytest.mark.parametrize("name", ["step-0", "step-0.pt"])
def test_what_has_taken_a_listed_name_meanwhile_is_never_deleted(runs: Path, solo: Communicator, name: str) -> None:
    path = runs / name
    save(path, {"t": torch.zeros(1)}, solo, keep_last=1)
    if path.is_dir():
        shutil.rmtree(path)
    save(path, {"t": torch.zeros(2)}, solo)  # without keep_last: not the series' any more
    save_steps(runs, solo, range(1, 3), 1)
    assert steps(runs) == [name, "step-2"]
    assert listed(runs) == ["step-2"]


def test_files_that_somebody_put_into_an_old_checkpoint_stay(runs: Path, solo: Communicator) -> None:
    save_steps(runs, solo, range(1), 1, format="safetensors")
    (runs / "step-0" / "config.json").write_text("precious")
    save_steps(runs, solo, range(1, 3), 1, format="safetensors")
    assert steps(runs) == ["step-0", "step-2"]
    assert os.listdir(runs / "step-0") == ["config.json"]


def test_one_that_is_saved_again_is_the_newest(runs: Path, solo: Communicator) -> None:
    save_steps(runs, solo, range(2), 2)
    save_steps(runs, solo, range(1), 2)
    assert listed(runs) == ["step-1", "step-0"]
    save_steps(runs, solo, range(2, 3), 2)
    assert steps(runs) == ["step-0", "step-2"]


def test_an_old_one_that_is_being_saved_is_left_for_the_next_time(runs: Path, solo: Communicator) -> None:
    save_steps(runs, solo, range(2), 1 + 1)
    lock = SaveLock(runs / "step-0")
    save_steps(runs, solo, range(2, 3), 2)
    assert steps(runs) == [".step-0.lock", "step-0", "step-1", "step-2"]
    lock.release()
    save_steps(runs, solo, range(3, 4), 2)
    assert steps(runs) == ["step-2", "step-3"]


def test_a_deletion_that_was_cut_short_is_finished_by_the_next_save(
    runs: Path, solo: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(runs, solo, range(1), 1)
    with monkeypatch.context() as patch:

        def fail(*args: Any, **kwargs: Any) -> None:
            raise OSError(5, "Input/output error")

        patch.setattr(shutil, "rmtree", fail)
        with pytest.raises(CheckpointError, match=r"step-1 is saved, but the series .* could not be updated"):
            save_steps(runs, solo, range(1, 2), 1)
    assert resolve(runs / "latest") == runs / "step-1"
    assert len(steps(runs)) == 2
    save_steps(runs, solo, range(2, 3), 1)
    assert steps(runs) == ["step-2"]


def test_the_pointer_falls_back_to_the_one_before(runs: Path, solo: Communicator) -> None:
    save_steps(runs, solo, range(3), 3)
    shutil.rmtree(runs / "step-2")
    assert resolve(runs / "latest") == runs / "step-1"
    (runs / "step-1" / ".metadata").unlink()
    assert resolve(runs / "latest") == runs / "step-0"
    shutil.rmtree(runs / "step-0")
    with pytest.raises(CheckpointNotFoundError, match="lists step-0, step-1, step-2, but none of these is there"):
        resolve(runs / "latest")


def test_the_pointer_finds_one_whose_save_was_killed_between_renames(runs: Path, solo: Communicator) -> None:
    save_steps(runs, solo, range(2), 2)
    os.rename(runs / "step-1", CheckpointFolder(runs / "step-1").previous)
    assert resolve(runs / "latest") == resolve(runs / "step-1") == runs / ".step-1.previous"


def test_resolving_takes_everything_else_as_it_is(runs: Path, solo: Communicator) -> None:
    runs.mkdir()
    (runs / "hf").mkdir()
    (runs / "model.pt").write_text("")
    (runs / "latest").write_text("something else")
    for name in ("hf", "model.pt", "latest"):
        assert resolve(runs / name) == runs / name
    with pytest.raises(CheckpointNotFoundError, match="nothing has that name"):
        resolve(runs / "nothing")
    save(runs / "c", {"a": 1}, solo)
    (runs / "link").symlink_to("c")
    assert resolve(runs / "link") == runs / "c"
    with pytest.raises(CheckpointNotFoundError, match=r"Checkpoints in .*: c"):
        resolve(runs / "nothing")


@pytest.mark.parametrize("names", [["../outside"], ["/outside"], [".."], [""]])
def test_a_pointer_does_not_lead_out_of_its_folder(
    runs: Path, tmp_path: Path, solo: Communicator, names: list[str]
) -> None:
    save(tmp_path / "outside", {"a": 1}, solo)
    save_steps(runs, solo, range(1), 1)
    text = json.loads((runs / "latest").read_text())
    text["checkpoints"] = [{"name": name, "mark": "unknown"} for name in names]
    (runs / "latest").write_text(json.dumps(text))
    with pytest.raises(CheckpointNotFoundError):
        resolve(runs / "latest")


@pytest.mark.parametrize("keep_last", [0, -1, True, 1.5, "two"])
def test_a_number_to_keep_that_is_none_is_refused(runs: Path, solo: Communicator, keep_last: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"keep_last={keep_last!r} must be"):
        save_steps(runs, solo, range(1), keep_last)


def test_a_checkpoint_of_a_series_cannot_have_the_pointers_name(runs: Path, solo: Communicator) -> None:
    with pytest.raises(ConfigurationError, match="Save to a path such as"):
        save(runs / "latest", {"a": 1}, solo, keep_last=1)


def test_something_else_that_has_the_pointers_name_is_not_replaced(runs: Path, solo: Communicator) -> None:
    runs.mkdir()
    (runs / "latest").write_text("precious")
    with pytest.raises(CheckpointError, match="something else has that name"):
        save_steps(runs, solo, range(1), 1)
    assert os.listdir(runs) == ["latest"]
    assert (runs / "latest").read_text() == "precious"
