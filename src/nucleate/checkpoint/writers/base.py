"""The interface of writers: a writer writes a snapshot into a draft, on all ranks together."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from nucleate.checkpoint.saving.snapshot import Snapshot
from nucleate.cluster.save_group import SaveGroup
from nucleate.plugin import Named


class Writer(Named):
    """A writer of one format. It writes a draft; `save` gives the draft the checkpoint's name only when it is whole.

    A plugin registers its writer under the format's name in the group `nucleate.writers`. `save(format=...)` takes that
    name.
    """

    kind: ClassVar[str] = "writer"
    #: The endings of paths that stand for one file of this format, such as `(".pt",)`.
    suffixes: ClassVar[tuple[str, ...]] = ()
    #: Whether the writer also writes folders.
    writes_folders: ClassVar[bool] = True
    #: Whether a new folder keeps the files that others put into the folder that it replaces.
    keeps_others: ClassVar[bool] = False

    def limit_files(self, max_bytes: int) -> None:
        """Limit the bytes of tensors that each file of a folder holds. The default does nothing."""

    def check(self, snapshot: Snapshot) -> None:
        """Refuse tensors and values that this format cannot hold, before anything is written; the same on every rank.

        Raises:
            CheckpointError: Tensors or values cannot be saved in this format; the message names them.
        """

    @abstractmethod
    def write(self, snapshot: Snapshot, draft: Path, group: SaveGroup) -> None:
        """Write the draft to disk, on all ranks together.

        The method may run in its own thread while training continues.

        Args:
            snapshot: The closed snapshot to write.
            draft: An empty folder, or the path of a file that does not exist yet. All ranks share its file system.
            group: The ranks.

        Raises:
            CheckpointError: Writing failed on this rank.
            RankFailedError: Writing failed on another rank.
        """
