"""Checkpoints at addresses such as `s3://bucket/model`: fsspec copies their files to this machine."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
from pathlib import Path, PurePosixPath
from typing import Any

from nucleate.errors import CheckpointError, CheckpointNotFoundError, ConfigurationError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")


def is_address(path: str | os.PathLike[str]) -> bool:
    """Return whether a path has a scheme, such as `s3://`."""
    return _ADDRESS.match(os.fspath(path)) is not None


def refuse_address(path: str | os.PathLike[str], what: str) -> None:
    """Refuse an address for work that needs a local path.

    Args:
        path: The path that the user gave.
        what: The work, for the message.

    Raises:
        ConfigurationError: `path` has a scheme.
    """
    if is_address(path):
        address = os.fspath(path)
        raise ConfigurationError(
            f"{what} needs a local path, and {address!r} is an address. Give a local path, and copy the result: "
            f"`fsspec.filesystem({address.split('://')[0]!r}).put(local, {address!r}, recursive=True)`."
        )


class LocalCopy:
    """A copy of a checkpoint in a temporary folder. The copy is deleted when nothing refers to this object any more.

    Args:
        address: The address of a file or folder. Of a folder, the files directly in it are copied.

    Attributes:
        path: The copy, with the name of the file or folder.

    Raises:
        CheckpointNotFoundError: There is nothing at the address.
        CheckpointError: The files cannot be copied.
        ConfigurationError: No installed package reads such addresses.
    """

    def __init__(self, address: str) -> None:
        files, place = _file_system(address)
        folder = tempfile.mkdtemp(prefix="nucleate-")
        delete = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.path = Path(folder) / (PurePosixPath(place).name or "checkpoint")
        try:
            if files.isdir(place):
                self.path.mkdir()
                found = [item["name"] for item in files.ls(place, detail=True) if item["type"] == "file"]
                for name in found:
                    files.get_file(name, str(self.path / PurePosixPath(name).name))
            elif files.exists(place):
                files.get_file(place, str(self.path))
            else:
                raise CheckpointNotFoundError(f"there is no checkpoint at {address}: nothing has that name.")
        except CheckpointError:
            delete()
            raise
        except Exception as error:  # Each file system has errors of its own.
            delete()
            raise CheckpointError(
                f"{address} cannot be copied to {folder}: {type(error).__name__}: {error}. The environment "
                "variable TMPDIR chooses another place for the copy."
            ) from error


def _file_system(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it."""
    scheme = address.split("://")[0]
    try:
        import fsspec  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigurationError(
            f"{address} is an address, and fsspec reads addresses. Run `pip install fsspec`, or copy the files and "
            "give a local path."
        ) from error
    try:
        files, place = fsspec.core.url_to_fs(address)
    except ImportError as error:  # fsspec names the package that it needs.
        raise ConfigurationError(f"{address} cannot be read: {error}.") from error
    except ValueError as error:
        known = "such as s3://, gs://, http:// and memory://"
        raise ConfigurationError(f"{address} cannot be read: fsspec knows no scheme {scheme!r} ({known}).") from error
    return files, place
