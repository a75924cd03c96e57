"""Files and folders that nodes do not share: a rank that does not see them says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from nucleate.checkpoint.writers.allocation import check_seen, failure
from nucleate.errors import CheckpointError


def test_a_folder_that_this_rank_does_not_see_is_refused_by_name(tmp_path: Path) -> None:
    check_seen(tmp_path)
    with pytest.raises(CheckpointError, match="has made the folder .*/absent, .* they must share the file system"):
        check_seen(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_a_file_that_this_rank_does_not_see_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        (tmp_path / "absent.safetensors").open()
    message = str(failure(tmp_path / "absent.safetensors", missing.value))
    assert "absent.safetensors cannot be written" in message
    assert "they must share the file system" in message
