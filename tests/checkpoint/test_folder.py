"""The folder of a checkpoint: found, replaced, and never damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nucleate.checkpoint.disk.folder import MARKER, METADATA, CheckpointFolder, discard
from nucleate.errors import CheckpointError, CheckpointNotFoundError


def fill(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MARKER, METADATA, "__0_0.distcp"):
        (folder / name).write_text(text)


def text(folder: Path) -> str:
    return (folder / "__0_0.distcp").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder.at(tmp_path / "runs" / "last")


def commit(folder: CheckpointFolder, content: str) -> None:
    draft = folder.draft()
    fill(draft, content)
    folder.commit(draft)


def test_a_committed_draft_is_located(folder: CheckpointFolder) -> None:
    commit(folder, "one")
    assert folder.locate() == folder.path
    assert text(folder.path) == "one"


def test_a_second_commit_replaces_the_first_and_leaves_nothing_else(folder: CheckpointFolder) -> None:
    commit(folder, "one")
    commit(folder, "two")
    assert text(folder.locate()) == "two"
    assert os.listdir(folder.path.parent) == ["last"]


def test_nothing_is_found_before_the_draft_is_committed(folder: CheckpointFolder) -> None:
    fill(folder.draft(), "one")
    with pytest.raises(CheckpointNotFoundError, match="nothing has that name"):
        folder.locate()


def test_the_old_one_is_found_while_the_new_one_has_not_taken_its_name(folder: CheckpointFolder) -> None:
    fill(folder.previous, "one")
    assert text(folder.locate()) == "one"


def test_locating_changes_nothing(folder: CheckpointFolder) -> None:
    fill(folder.previous, "one")
    before = sorted(folder.path.parent.rglob("*"))
    folder.locate()
    assert sorted(folder.path.parent.rglob("*")) == before


def test_the_next_draft_puts_a_stranded_checkpoint_back(folder: CheckpointFolder) -> None:
    fill(folder.previous, "one")
    folder.draft()
    assert text(folder.path) == "one"
    assert not folder.previous.exists()


def test_the_next_draft_deletes_what_killed_saves_left(folder: CheckpointFolder) -> None:
    fill(folder.path, "two")
    fill(folder.previous, "one")
    stale = folder.path.with_name(".last.draft-0badcafe")
    fill(stale, "half")
    draft = folder.draft()
    assert text(folder.locate()) == "two"
    assert sorted(os.listdir(folder.path.parent)) == sorted(["last", draft.name])


def test_a_neighbour_with_a_similar_name_keeps_its_drafts(tmp_path: Path) -> None:
    other = CheckpointFolder.at(tmp_path / "a1").draft()
    CheckpointFolder.at(tmp_path / "a[1]").draft()
    CheckpointFolder.at(tmp_path / "a?").draft()
    assert other.exists()


def test_a_failed_rename_puts_the_old_one_back(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(folder, "one")
    draft = folder.draft()
    fill(draft, "two")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if source == draft:
            raise OSError("no space")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(CheckpointError, match="no space"):
        folder.commit(draft)
    assert text(folder.path) == "one"


def test_a_discarded_draft_is_gone_and_discarding_twice_is_harmless(folder: CheckpointFolder) -> None:
    draft = folder.draft()
    discard(draft)
    discard(draft)
    assert not draft.exists()


def test_an_empty_folder_may_be_taken(folder: CheckpointFolder) -> None:
    folder.path.mkdir(parents=True)
    commit(folder, "one")
    assert text(folder.locate()) == "one"


def test_a_file_is_not_overwritten(folder: CheckpointFolder) -> None:
    folder.path.parent.mkdir()
    folder.path.write_text("precious")
    with pytest.raises(CheckpointError, match="is a file"):
        folder.draft()
    assert folder.path.read_text() == "precious"


def test_a_folder_of_somebody_else_is_not_overwritten(folder: CheckpointFolder) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match=r"it holds thesis\.tex"):
        folder.draft()
    assert (folder.path / "thesis.tex").exists()


def test_a_file_that_was_put_into_a_checkpoint_is_not_lost(folder: CheckpointFolder) -> None:
    commit(folder, "one")
    draft = folder.draft()
    fill(draft, "two")
    (folder.path / "loss.png").write_text("precious")
    with pytest.raises(CheckpointError, match=r"somebody put loss\.png"):
        folder.commit(draft)
    assert (folder.path / "loss.png").exists()
    assert text(folder.path) == "one"


def test_a_link_stays_a_link_to_the_new_checkpoint(tmp_path: Path) -> None:
    commit(CheckpointFolder.at(tmp_path / "step-1"), "one")
    (tmp_path / "latest").symlink_to("step-1")
    commit(CheckpointFolder.at(tmp_path / "latest"), "two")
    assert (tmp_path / "latest").is_symlink()
    assert text(tmp_path / "step-1") == "two"


def test_what_is_missing_is_told_with_its_neighbours(tmp_path: Path) -> None:
    commit(CheckpointFolder.at(tmp_path / "step-1"), "one")
    with pytest.raises(CheckpointNotFoundError, match=r"Checkpoints in .*: step-1\."):
        CheckpointFolder.at(tmp_path / "step-2").locate()
    with pytest.raises(CheckpointNotFoundError, match="There is no folder"):
        CheckpointFolder.at(tmp_path / "nowhere" / "step-2").locate()


@pytest.mark.parametrize("is_file", [True, False])
def test_what_is_no_checkpoint_is_told_as_what_it_is(tmp_path: Path, is_file: bool) -> None:
    path = tmp_path / "thing"
    if is_file:
        path.write_text("")
    else:
        path.mkdir()
    with pytest.raises(CheckpointNotFoundError, match="it is a file" if is_file else "it is a folder without"):
        CheckpointFolder.at(path).locate()


def test_the_root_is_no_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="give a name below it"):
        CheckpointFolder.at("/")


def test_a_place_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        CheckpointFolder.at(tmp_path / "file" / "last").draft()


def test_a_checkpoint_is_not_lost_when_its_name_was_taken_after_a_kill(folder: CheckpointFolder) -> None:
    fill(folder.previous, "one")
    folder.path.mkdir()
    (folder.path / "config.json").write_text("")
    with pytest.raises(CheckpointError, match=r"its last whole checkpoint is .*\.last\.previous; but then"):
        CheckpointFolder(folder.path, takes_along=True).draft()
    assert text(folder.previous) == "one"
    assert (folder.path / "config.json").exists()


def test_files_of_others_come_back_after_a_kill_between_the_renames(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / "config.json").write_text("config")
    ours = CheckpointFolder(folder.path, takes_along=True)
    draft = ours.draft()
    (draft / MARKER).write_text("")
    (draft / "model.safetensors").write_text("new")
    os.rename(ours.path, ours.previous)  # and killed
    discard(draft)
    ours.draft()
    assert (ours.path / "config.json").read_text() == "config"
    assert not ours.previous.exists()
