"""Checkpoint of one file: whole or absent, because the system renames in one step."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from nucleate.checkpoint.disk.target import CheckpointTarget, sync
from nucleate.errors import CheckpointError


@dataclass(frozen=True)
class CheckpointFile(CheckpointTarget):
    """The place of a checkpoint of one file. A save replaces another file of that name."""

    def draft(self) -> Path:
        self._refuse_others()
        self.make_parent()
        try:
            self.sweep()
        except OSError as error:
            raise self.failure(error) from error
        return self.fresh()

    def commit(self, draft: Path) -> None:
        self._refuse_others()
        try:
            os.replace(draft, self.path)
            sync(self.path.parent)
        except OSError as error:
            raise self.failure(error) from error

    def _refuse_others(self) -> None:
        if self.path.exists() and not self.path.is_file():
            what = "a folder" if self.path.is_dir() else "not a regular file"
            raise CheckpointError(
                f"{self.path} is {what}, and its ending stands for a checkpoint of one file. Give another path."
            )
