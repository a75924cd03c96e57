"""The job of a save: the part that touches the disk, which may run in the background."""

from __future__ import annotations

from pathlib import Path

from nucleate.checkpoint.disk.leftovers import remove_leftovers
from nucleate.checkpoint.disk.lock import SaveLock
from nucleate.checkpoint.disk.series import Series
from nucleate.checkpoint.disk.target import CheckpointTarget, discard
from nucleate.checkpoint.saving.snapshot import Snapshot
from nucleate.checkpoint.writers.base import Writer
from nucleate.cluster.save_group import SaveGroup


class SaveJob:
    """One save on disk: it locks the name, writes a draft, and gives the draft the name."""

    def __init__(
        self, snapshot: Snapshot, writer: Writer, target: CheckpointTarget, series: Series | None, group: SaveGroup
    ) -> None:
        self._snapshot: Snapshot | None = snapshot
        self._writer = writer
        self._target = target
        self._series = series
        self._group = group
        self._lock: SaveLock | None = None
        self._draft: Path | None = None
        self._saving = f"saving the checkpoint {target.path}"

    def prepare(self, copied: bool) -> None:
        """Take the lock and name the draft. If `copied`, copy the state, because training continues meanwhile."""
        try:
            with self._group.all_or_none(self._saving):
                if self._group.rank == 0:
                    self._target.make_parent()
                    try:
                        self._lock = SaveLock(self._target.path)
                    except OSError as error:
                        raise self._target.failure(error) from error
                    self._draft = self._target.draft()
                    remove_leftovers(self._target)
                if copied:
                    assert self._snapshot is not None
                    self._snapshot.freeze()
        except BaseException:
            self.clean_up()
            raise

    def run(self) -> None:
        """Write the draft, give it the checkpoint's name, and delete old checkpoints."""
        try:
            draft = self._group.broadcast(self._draft)
            assert draft is not None, "rank 0 made it"
            assert self._snapshot is not None, "a job runs once"
            self._writer.write(self._snapshot, draft, self._group)
            with self._group.all_or_none(self._saving):
                if self._group.rank == 0:
                    self._target.finish(draft, self._writer.name, self._group.world_size)
                    if self._series is not None:
                        self._series.announce(self._target.path, draft)
                    self._target.commit(draft)
                    if self._series is not None:
                        self._series.add(self._target.path)
                # Inside the block: when `save` returns on any rank, the lock and the draft are gone.
                self.clean_up()
        finally:
            # An error keeps this frame alive, but the copy of the state must be freed.
            self._snapshot = None
            self.clean_up()

    def clean_up(self) -> None:
        """Delete a draft that did not get the checkpoint's name, and release the lock."""
        if self._draft is not None:
            discard(self._draft)
        if self._lock is not None:
            self._lock.release()
        self._draft = self._lock = None
