"""Folders that stay open while they are read, so that all files come from one save."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType

from nucleate.checkpoint.stored.data_file import DataFile
from nucleate.errors import CheckpointError


class OpenFolder:
    """A folder whose files are opened relative to the open folder, not by their paths.

    A save replaces a checkpoint by renames. Paths would then lead into the new folder, but an open folder stays the
    old one. After an error inside its context, all files that were opened are closed.

    Args:
        path: The path of the folder.

    Raises:
        CheckpointError: The folder cannot be opened.

    Attributes:
        path: The path of the folder when it was opened, for messages.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: list[DataFile] = []
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}.") from error

    def names(self) -> list[str]:
        """Return the names in the folder, sorted."""
        return sorted(os.listdir(self._descriptor))

    def has(self, name: str) -> bool:
        """Return whether the folder has a file or folder of this name."""
        try:
            os.stat(name, dir_fd=self._descriptor)
        except (OSError, ValueError):
            return False
        return True

    def is_folder(self, name: str) -> bool:
        """Return whether the folder has a folder of this name."""
        try:
            return stat.S_ISDIR(os.stat(name, dir_fd=self._descriptor).st_mode)
        except (OSError, ValueError):
            return False

    def open(self, name: str) -> DataFile:
        """Open a file in the folder. It stays open when the folder is closed.

        Args:
            name: The name of the file, without a folder.

        Raises:
            CheckpointNotFoundError: The file does not exist.
            CheckpointError: It is not a regular file, or cannot be opened.
        """
        file = DataFile(self.path / name, self._descriptor)
        self._files.append(file)
        return file

    def close(self) -> None:
        """Close the folder. Its opened files stay open."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._files.clear()

    def __enter__(self) -> OpenFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            for file in self._files:
                file.close()
        self.close()
