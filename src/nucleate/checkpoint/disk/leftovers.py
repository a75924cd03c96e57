"""Leftovers of killed saves: drafts, locks and renamed checkpoints of any name in a folder.

A save tidies up after earlier saves to its own name. This file tidies up after the saves to other names in the same
folder, such as the steps of a series. It touches only names whose last save is surely dead; see `SaveLock`.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from nucleate.checkpoint.disk.folder import CheckpointFolder
from nucleate.checkpoint.disk.lock import SaveLock, is_note
from nucleate.checkpoint.disk.target import CheckpointTarget, delete
from nucleate.errors import CheckpointError

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>draft-[0-9a-f]{8}|previous|lock)", re.DOTALL)


def remove_leftovers(target: CheckpointTarget) -> None:
    """Remove the leftovers of dead saves to other names in the folder of `target`. Errors leave them there.

    A checkpoint that a killed save had renamed gets its name back. The caller holds the lock on `target`.
    """
    folder = target.path.parent
    drafts: dict[str, list[Path]] = {}
    with contextlib.suppress(OSError):
        for item in folder.iterdir():
            match = _LEFTOVER.fullmatch(item.name)
            # Other programs have hidden files that are called `.NAME.lock` as well.
            if match is not None and (match["kind"] != "lock" or is_note(item)):
                drafts.setdefault(match["name"], []).extend([item] if match["kind"].startswith("draft") else [])
    doomed: list[Path] = []
    for name, items in drafts.items():
        if name != target.path.name:
            with contextlib.suppress(OSError):
                _tidy(CheckpointFolder(folder / name), items, target, doomed)
    for path in doomed:
        with contextlib.suppress(OSError):
            delete(path)


def _tidy(other: CheckpointFolder, drafts: list[Path], target: CheckpointTarget, doomed: list[Path]) -> None:
    """Tidy up one name. Its drafts become drafts of `target`, because its lock must soon be free again."""
    try:
        lock = SaveLock(other.path, tidies=True)
    except CheckpointError:
        return
    try:
        # If somebody else has created a checkpoint of this name, the user has to decide.
        with contextlib.suppress(CheckpointError):
            other.recover()
        for draft in drafts:
            place = target.fresh()
            os.rename(draft, place)
            doomed.append(place)
    finally:
        lock.release()
