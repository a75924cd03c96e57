"""The base class of readers. A reader finds the contents of a file or folder, and the place of each tensor there."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from nucleate.checkpoint.stored.contents import Contents
from nucleate.plugin import Named


class Reader(Named):
    """A reader of the headers of one checkpoint format.

    A reader does not read tensors. It returns the files and offsets of each tensor's bytes. Everything else (shards,
    casts, key maps, reports) is the same for all formats. The reader of a format that cannot be read in parts returns
    bytes in memory (`HeldBytes`).
    """

    kind: ClassVar[str] = "reader"

    @abstractmethod
    def claims(self, path: Path) -> bool:
        """Return whether `path` has the format of this reader, judged by names and first bytes.

        Args:
            path: A file or folder that exists. A reader also claims a damaged file of its format, so that `read` can
                report the damage.
        """

    @abstractmethod
    def read(self, path: Path) -> Contents:
        """Read the headers, without running code from the file.

        The reader checks everything that needs no tensor data: every chunk lies inside its file
        (`StoredTensor.check`), every file that an index names exists, and no key appears twice.

        Args:
            path: The same file or folder as for `claims`.

        Raises:
            CheckpointError: The checkpoint is damaged or has another format. The message names the file and the key,
                and says what to do.
        """

    def trusting(self) -> Reader:
        """Return a reader for files that the user trusts, which may run code that they choose.

        It reads objects that only such code can make. By default a format has no such objects, so this is the same
        reader.
        """
        return self
