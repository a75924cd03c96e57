"""What a reader is: it tells what a file or folder holds, and where each tensor lies in it."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from nucleate.checkpoint.stored.contents import Contents
from nucleate.plugin import Named


class Reader(Named):
    """Reads the headers of one checkpoint format.

    It reads no tensor: what it returns says in which files the bytes of each one lie, and everything else (shards,
    casts, key maps, reports) is the same for all formats. Formats that cannot be read in parts hand over bytes in
    memory (`HeldBytes`).
    """

    kind: ClassVar[str] = "reader"

    @abstractmethod
    def claims(self, path: Path) -> bool:
        """Return whether this reader is meant for what is at `path`, by names and first bytes.

        Args:
            path: A file or folder that exists. It may be damaged: a reader claims it by what it was meant to be, so
                that `read` can say what is wrong.
        """

    @abstractmethod
    def read(self, path: Path) -> Contents:
        """Read the headers, without running code from the file.

        Everything that can be checked without reading tensors has been checked when it returns: every chunk lies
        inside its file (`StoredTensor.check`), every file that an index names is there, no key appears twice.

        Args:
            path: What `claims` was asked for.

        Raises:
            CheckpointError: It is damaged or not of this format; the message names file and key and says what to do.
        """
