"""What a writer is: it puts a snapshot into a draft, on all ranks together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from nucleate.checkpoint.save_group import SaveGroup
from nucleate.checkpoint.snapshot import Snapshot


class Writer(ABC):
    """Writes one format. That the result is whole or absent is not its business: it writes a draft."""

    #: What users call the format.
    format: ClassVar[str]

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
            draft: An empty folder, or where a file is to be, on a file system that all ranks share.
            group: The ranks.

        Raises:
            CheckpointError: Writing failed on this rank.
            RankFailedError: It failed on another one.
        """
