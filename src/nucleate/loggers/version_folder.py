"""The folder of one run: `root/name/version_3`. Each run gets a new one, and several runs may start at once."""

from __future__ import annotations

import os
from pathlib import Path

from nucleate.errors import ConfigurationError, UsageError


class VersionFolder:
    """The folder of one run, which is made at the first use.

    Args:
        root_dir: The folder of all experiments.
        name: The name of the experiment, a folder inside `root_dir`. None and `""` leave this folder out.
        version: A number or the name of the folder of this run. None takes the next free number. A folder that is there
            is continued, never overwritten.

    Raises:
        ConfigurationError: `version` is not a number of at least 0 or the name of a folder.
    """

    def __init__(self, root_dir: str | os.PathLike[str], name: str | None, version: int | str | None) -> None:
        if isinstance(version, bool) or not isinstance(version, (int, str, type(None))):
            raise ConfigurationError(f"version={version!r} must be a number, the name of a folder, or None.")
        if version == "" or (isinstance(version, int) and version < 0):
            raise ConfigurationError(f"version={version!r} must be a number of at least 0 or the name of a folder.")
        self.root_dir = os.fspath(root_dir)
        self.name = name or ""
        self._version = version
        self._claimed = False

    @property
    def parent(self) -> Path:
        """The folder that has the folders of all runs."""
        return Path(self.root_dir, self.name)

    def path(self, writes: bool) -> Path:
        """Return the folder of this run.

        Args:
            writes: Whether this process may make the folder.

        Raises:
            UsageError: Rank 0 has not told this rank its folder yet.
        """
        version = self.version(writes)
        return self.parent / (f"version_{version}" if isinstance(version, int) else version)

    def version(self, writes: bool) -> int | str:
        """Return the version of this run. See `path`."""
        if writes:
            return self.claim()
        if self._version is None:
            raise UsageError(
                "this rank does not know the folder of the logs yet: rank 0 chooses it. Call runtime.launch() first."
            )
        return self._version

    def claim(self) -> int | str:
        """Make the folder of this run, if it was not made yet, and return the version."""
        if not self._claimed:
            self.parent.mkdir(parents=True, exist_ok=True)
            if self._version is None:
                self._version = self._make_next()
            else:
                self.path(writes=False).mkdir(parents=True, exist_ok=True)
            self._claimed = True
        assert self._version is not None
        return self._version

    def follow(self, version: int | str) -> None:
        """Take the version that another process has claimed."""
        self._version = version

    def _make_next(self) -> int:
        names = (entry.name.removeprefix("version_") for entry in self.parent.iterdir() if entry.name[:8] == "version_")
        number = max((int(name) for name in names if name.isdecimal()), default=-1) + 1
        while True:
            try:
                # Not `exist_ok`: of two runs that start at once, one takes the next number.
                (self.parent / f"version_{number}").mkdir()
            except FileExistsError:
                number += 1
            else:
                return number
