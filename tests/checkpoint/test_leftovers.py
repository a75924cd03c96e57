"""A save removes what dead saves to other names have left in its folder, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch

from nucleate.checkpoint import convert, load, save
from nucleate.checkpoint.disk import lock as lock_file
from nucleate.checkpoint.disk.folder import CheckpointFolder
from nucleate.checkpoint.disk.lock import SaveLock
from nucleate.checkpoint.disk.series import Series, resolve
from nucleate.cli import main
from nucleate.cluster import Communicator
from nucleate.errors import CheckpointNotFoundError, ConfigurationError

HOLD = """
import pathlib, sys
from nucleate.checkpoint.disk.lock import SaveLock
lock = SaveLock(pathlib.Path(sys.argv[1]))
print("held", flush=True)
input()
"""


def write(path: Path, number: int, solo: Communicator) -> None:
    save(path, {"t": torch.tensor(float(number))}, solo)


def number_at(path: Path, solo: Communicator) -> float:
    return float(load(path, None, solo)["t"])


def leave_draft(folder: Path, name: str) -> Path:
    draft = folder / f".{name}.draft-0badcafe"
    draft.mkdir()
    (draft / "__0_0.distcp").write_text("half of a checkpoint")
    return draft


def leave_lock(folder: Path, name: str, note: str) -> Path:
    place = folder / f".{name}.lock"
    place.write_text(note)
    return place


def strand(path: Path) -> Path:
    """Leave a folder as a save does that is killed between its two renames."""
    previous = path.with_name(f".{path.name}.previous")
    os.rename(path, previous)
    return previous


def here(pid: int = 1) -> str:
    return f"process {pid} on here\n{lock_file._boot_id()}"


def test_what_dead_saves_to_other_names_left_is_removed(tmp_path: Path, solo: Communicator) -> None:
    leave_draft(tmp_path, "a")
    leave_draft(tmp_path, "b")
    leave_lock(tmp_path, "b", here())
    leave_lock(tmp_path, "c", here())
    (tmp_path / ".d.pt.draft-0badcafe").write_text("half of a file")
    write(tmp_path / "new", 1, solo)
    assert os.listdir(tmp_path) == ["new"]


def test_a_checkpoint_that_a_dead_save_had_renamed_gets_its_name_back(tmp_path: Path, solo: Communicator) -> None:
    write(tmp_path / "old", 1, solo)
    strand(tmp_path / "old")
    write(tmp_path / "new", 2, solo)
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]
    assert number_at(tmp_path / "old", solo) == 1


def test_a_renamed_checkpoint_whose_name_somebody_else_took_stays(tmp_path: Path, solo: Communicator) -> None:
    write(tmp_path / "old", 1, solo)
    strand(tmp_path / "old")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("mine")
    write(tmp_path / "new", 2, solo)
    assert sorted(os.listdir(tmp_path)) == [".old.previous", "new", "old"]


def test_a_running_save_of_another_process_is_not_touched(tmp_path: Path, solo: Communicator) -> None:
    draft = leave_draft(tmp_path, "a")
    command = [sys.executable, "-c", HOLD, tmp_path / "a"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    write(tmp_path / "new", 1, solo)
    assert (draft / "__0_0.distcp").exists()
    assert (tmp_path / ".a.lock").exists()
    process.kill()
    process.communicate()
    write(tmp_path / "new", 2, solo)
    assert os.listdir(tmp_path) == ["new"]


def test_a_save_on_another_machine_counts_as_dead_only_after_a_day(tmp_path: Path, solo: Communicator) -> None:
    """Some network file systems give one lock to processes on two machines."""
    draft = leave_draft(tmp_path, "a")
    place = leave_lock(tmp_path, "a", "process 7 on elsewhere\nanother boot id")
    write(tmp_path / "new", 1, solo)
    assert sorted(os.listdir(tmp_path)) == sorted([place.name, draft.name, "new"])
    assert place.read_text().startswith("process 7 on elsewhere")
    long_ago = 1.6e9
    os.utime(place, (long_ago, long_ago))
    os.utime(draft, (long_ago, long_ago))
    write(tmp_path / "new", 2, solo)
    assert draft.exists(), "one of its files was written lately"
    os.utime(draft / "__0_0.distcp", (long_ago, long_ago))
    write(tmp_path / "new", 3, solo)
    assert os.listdir(tmp_path) == ["new"]


def test_files_of_other_programs_stay(tmp_path: Path, solo: Communicator) -> None:
    names = [".a.lock", ".b.lock", ".c.draft-2", ".d.draft-0badcafes", ".previous", ".e.draft-0BADCAFE", "f.lock"]
    for name in names:
        (tmp_path / name).write_text("" if name == ".a.lock" else "mine")
    write(tmp_path / "new", 1, solo)
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "new"])


def test_where_locks_are_unknown_nothing_of_other_names_is_touched(
    tmp_path: Path, solo: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = leave_draft(tmp_path, "a")

    def without_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock_file.fcntl, "flock", without_locks)
    write(tmp_path / "new", 1, solo)
    assert sorted(os.listdir(tmp_path)) == [draft.name, "new"]


def test_a_save_waits_for_another_one_that_tidies_up(tmp_path: Path, solo: Communicator) -> None:
    lock = SaveLock(tmp_path / "new", tidies=True)
    threading.Timer(0.2, lock.release).start()
    write(tmp_path / "new", 1, solo)
    assert os.listdir(tmp_path) == ["new"]


def test_a_checkpoint_that_was_whole_when_its_job_died_is_found_and_listed(
    tmp_path: Path, solo: Communicator, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        save(tmp_path / f"step-{number}", {"t": torch.tensor(float(number))}, solo, keep_last=2)
    previous = strand(tmp_path / "step-1")
    assert number_at(tmp_path / "latest", solo) == 1
    assert number_at(tmp_path / "step-1", solo) == 1
    with pytest.raises(CheckpointNotFoundError, match=r"Checkpoints in .*: step-0, step-1\."):
        resolve(tmp_path / "step-7")
    assert main(["inspect", str(tmp_path / "step-1")]) == 0
    assert main(["verify", str(tmp_path / "step-1")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path)]) == 1
    assert f"{tmp_path / 'step-1'}" in capsys.readouterr().err
    assert previous.exists(), "reading changes nothing"


def test_a_conversion_does_not_replace_a_checkpoint_that_a_dead_save_had_renamed(
    tmp_path: Path, solo: Communicator
) -> None:
    write(tmp_path / "source", 1, solo)
    write(tmp_path / "target", 2, solo)
    strand(tmp_path / "target")
    with pytest.raises(ConfigurationError, match="exists already"):
        convert(tmp_path / "source", tmp_path / "target")
    assert number_at(tmp_path / "target", solo) == 2
    convert(tmp_path / "source", tmp_path / "target", overwrite=True)
    assert number_at(tmp_path / "target", solo) == 1


def test_a_series_deletes_what_a_save_that_was_killed_before_it_listed_its_checkpoint_left(
    tmp_path: Path, solo: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Series.add
    for number in range(5):
        monkeypatch.setattr(Series, "add", add if number != 1 else lambda *_: None)
        save(tmp_path / f"step-{number}.pt", {"t": torch.tensor(float(number))}, solo, keep_last=2)
        assert number_at(tmp_path / "latest", solo) == number
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-3.pt", "step-4.pt"]


def test_an_announced_checkpoint_that_never_came_is_forgotten(tmp_path: Path, solo: Communicator) -> None:
    save(tmp_path / "step-0", {"t": torch.tensor(0.0)}, solo, keep_last=2)
    interrupted = mock.patch.object(CheckpointFolder, "commit", side_effect=KeyboardInterrupt)
    with interrupted, pytest.raises(KeyboardInterrupt):
        save(tmp_path / "step-1", {"t": torch.tensor(1.0)}, solo, keep_last=2)
    assert "announced" in (tmp_path / "latest").read_text()
    assert number_at(tmp_path / "latest", solo) == 0
    save(tmp_path / "step-2", {"t": torch.tensor(2.0)}, solo, keep_last=2)
    assert "announced" not in (tmp_path / "latest").read_text()
    shutil.rmtree(tmp_path / "step-2")
    assert number_at(tmp_path / "latest", solo) == 0
