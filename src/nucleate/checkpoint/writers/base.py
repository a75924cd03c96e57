"""What a writer is: it puts a snapshot into a draft, on all ranks together."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from nucleate.checkpoint.saving.snapshot import Snapshot
from nucleate.cluster.save_group import SaveGroup
from nucleate.plugin import Named


class Writer(Named):
    """Writes one format. That the result is whole or absent is not its business: it writes a draft.

    A plugin is registered under the name of the format, in the group `nucleate.writers`; `save(format=...)` takes that
    name.
    """

    kind: ClassVar[str] = "writer"
    #: Endings of a path that stand for one file of this format, such as `(".pt",)`.
    suffixes: ClassVar[tuple[str, ...]] = ()
    #: Whether it writes folders as well.
    writes_folders: ClassVar[bool] = True
    #: Whether a new folder takes along what others have put into the folder that it replaces.
    keeps_others: ClassVar[bool] = False

    def limit_files(self, max_bytes: int) -> None:
        """Be told how many bytes of tensors a file of a folder may hold. Does nothing by default."""

    def check(self, snapshot: Snapshot) -> None:
        """Refuse what this format cannot hold, before anything is written; the same on every rank.

        Raises:
            CheckpointError: Tensors or values cannot be saved in this format; the message names them.
        """

    @abstractmethod
    def write(self, snapshot: Snapshot, draft: Path, group: SaveGroup) -> None:
        """Write the draft, and to disk, on all ranks together. It may run beside training, in a thread of its own.

        Args:
            snapshot: What to write, closed.
            draft: An empty folder; or where a file is to be, and nothing is. On a file system that all ranks share.
            group: The ranks.

        Raises:
            CheckpointError: Writing failed on this rank.
            RankFailedError: It failed on another one.
        """
