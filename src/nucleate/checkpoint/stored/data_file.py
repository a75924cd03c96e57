"""Files that tensors are read from: each is opened once, checked once, and read by position from any thread.

This module does not map files to read them. A mapped file that somebody cuts short kills the process, and over a
network each page needs its own request. `pread` reads straight into the final memory, and fails with an error that
names the file.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import weakref
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from torch import Tensor

from nucleate.checkpoint.disk.system_calls import system_call
from nucleate.checkpoint.stored.direct import BLOCK_BYTES, MIN_DIRECT_BYTES, DirectFile, Residency, is_wanted
from nucleate.checkpoint.stored.read_ahead import ReadAhead
from nucleate.errors import CheckpointError, CheckpointNotFoundError

_numbers = count()


class Bytes(Protocol):
    """Bytes that can be read from any offset.

    Attributes:
        name: The name of the bytes in messages.
        number: A number that is equal for bytes that follow one another, so that a reader can read them in order.
        size_bytes: The number of bytes.
    """

    name: str
    number: int
    size_bytes: int

    def read_into(self, address: int, size_bytes: int, offset: int) -> None:
        """Copy `size_bytes` bytes from `offset` on to the memory at `address`."""
        ...

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Return `size_bytes` bytes from `offset` on."""
        ...


class DataFile:
    """A file that stays open as long as it is needed, so that nobody can replace it between header and data.

    Args:
        path: The path of the file.
        folder: The descriptor of the open folder that holds the file. By default, the file is opened by its path.

    Raises:
        CheckpointNotFoundError: The file does not exist.
        CheckpointError: The path is not a regular file, or the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], folder: int | None = None) -> None:
        self.path = Path(path)
        self.name = str(self.path)
        self.number = next(_numbers)
        try:
            # O_NONBLOCK, because a pipe without a writer would otherwise never open.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
            self._descriptor = os.open(self.path if folder is None else self.path.name, flags, dir_fd=folder)
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(f"there is no file {self.path}.") from error
        except OSError as error:
            advice = " Allow more, such as `ulimit -n 65536`." if error.errno == errno.EMFILE else ""
            raise CheckpointError(f"{self.path} cannot be opened: {error.strerror}.{advice}") from error
        except ValueError as error:
            # A name with a zero byte, or with half of a character, which only a damaged index asks for.
            raise CheckpointNotFoundError(f"there is no file {self.name!r}: {error}.") from error
        self._closing = weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            self._closing()
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise CheckpointError(f"{self.path} is {what}; tensors are read from regular files.")
        self.size_bytes = status.st_size
        self._written_ns = status.st_mtime_ns
        #: The size of all files of the checkpoint together, as far as it is known.
        self.checkpoint_bytes = self.size_bytes
        #: Kept until the file is closed, such as a temporary folder that holds the file.
        self.keeps: object = None
        self._expected_bytes = 0
        # None before the first large read, and False if the file is read through the page cache.
        self._direct: DirectFile | Literal[False] | None = None
        self._is_far: bool | None = None

    def close(self) -> None:
        """Close the file at once, and not when nothing refers to it any more. It cannot be read afterwards."""
        self._closing()
        # The system may give the number to another file.
        self._descriptor = -1
        self.keeps = None
        if self._direct:
            self._direct.close()

    def expect(self, size_bytes: int) -> None:
        """Note that `size_bytes` more bytes are going to be read."""
        self._expected_bytes += size_bytes

    def check_unwritten(self) -> None:
        """Make sure that nobody has written to the file since it was opened.

        The check ignores a file that was cut short: reading it fails anyway.

        Raises:
            CheckpointError: Somebody has written to the file.
        """
        status = os.fstat(self._descriptor)
        if status.st_size >= self.size_bytes and status.st_mtime_ns != self._written_ns:
            raise CheckpointError(f"{self.path} was written to since its header was read")

    def is_unchanged(self) -> bool:
        """Return whether the path still leads to this file, and nobody has written to it since it was opened."""
        try:
            named = os.stat(self.path)
        except OSError:
            return False
        mine = os.fstat(self._descriptor)
        return os.path.samestat(mine, named) and (named.st_size, named.st_mtime_ns) == (
            self.size_bytes,
            self._written_ns,
        )

    def check_unchanged(self) -> None:
        """Make sure that the path still leads to this file, and that the file's length did not change.

        Raises:
            CheckpointError: The file was removed, was replaced, or has another length.
        """
        mine = os.fstat(self._descriptor)
        try:
            named = os.stat(self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path} is no longer there: {error.strerror}.") from error
        if (mine.st_dev, mine.st_ino, mine.st_size) != (named.st_dev, named.st_ino, self.size_bytes):
            raise CheckpointError(
                f"{self.path} was replaced or cut short since its header was read. Nothing may write to a checkpoint "
                "while it is read; load it again."
            )

    def check_length(self) -> None:
        """Make sure that the file is at least as long as it was when it was opened.

        Raises:
            CheckpointError: The file was cut short.
        """
        if os.fstat(self._descriptor).st_size < self.size_bytes:
            raise self._cut_short(0, self.size_bytes)

    def is_far(self) -> bool:
        """Return whether most of the file was not in the page cache at the first call."""
        if self._is_far is None:
            try:
                self._is_far = not Residency(self._descriptor, self.size_bytes).holds_most()
            except OSError:
                self._is_far = False
        return self._is_far

    def read_ahead(self, ahead: ReadAhead) -> None:
        """Start to bring the file into the page cache, and return at once."""
        ahead.start(self._descriptor, self.size_bytes)

    def read_into(self, address: int, size_bytes: int, offset: int) -> None:
        """Copy bytes to memory.

        Args:
            address: The address of the memory, which must have room for the bytes.
            size_bytes: The number of bytes.
            offset: The place of the first byte in the file.

        Raises:
            CheckpointError: The file ends too early, somebody has written to it, or the disk fails.
        """
        direct = self._read_past_cache() if self._direct or size_bytes >= MIN_DIRECT_BYTES else None
        done = 0
        while direct is not None and done < size_bytes:
            copied = direct.read(address + done, size_bytes - done, offset + done)
            if not copied:
                copied = min(size_bytes - done, BLOCK_BYTES)
                self._read_buffered(address + done, copied, offset + done)
            done += copied
        self._read_buffered(address + done, size_bytes - done, offset + done)
        status = os.fstat(self._descriptor)
        if status.st_mtime_ns != self._written_ns:
            if status.st_size < self.size_bytes:
                raise self._cut_short(offset, size_bytes)
            raise CheckpointError(
                f"{self.path} was written to while it was read, so its tensors may be those of two saves. Nothing may "
                "write to a checkpoint while it is read; load it again."
            )

    def _read_past_cache(self) -> DirectFile | None:
        if self._direct is None:
            # Threads that come here at the same time get the same result.
            self._direct = self._opened_direct() or False
        return self._direct or None

    def _opened_direct(self) -> DirectFile | None:
        if is_wanted(self._expected_bytes, self.size_bytes, self.checkpoint_bytes):
            # If the file system cannot read past the cache, the file is read like other files.
            with suppress(OSError):
                return DirectFile(self._descriptor, self.size_bytes)
        return None

    def _read_buffered(self, address: int, size_bytes: int, offset: int) -> None:
        done = 0
        while done < size_bytes:
            # Less than the most that the system reads in one call (read(2): 0x7ffff000 bytes).
            wanted = min(size_bytes - done, 1 << 30)
            copied = system_call("pread")(self._descriptor, address + done, wanted, offset + done)
            if copied > 0:
                done += copied
            elif copied == 0:
                raise self._cut_short(offset, size_bytes)
            elif (number := ctypes.get_errno()) != errno.EINTR:
                raise CheckpointError(f"reading {self.path} at byte {offset + done} failed: {os.strerror(number)}.")

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Return bytes, and take memory only for bytes that the file has.

        Raises:
            CheckpointError: The file ends too early, or the disk fails.
        """
        if offset < 0 or size_bytes < 0 or offset + size_bytes > self.size_bytes:
            raise self._cut_short(offset, size_bytes)
        parts: list[bytes] = []
        done = 0
        while done < size_bytes:
            try:
                part = os.pread(self._descriptor, min(size_bytes - done, 1 << 30), offset + done)
            except OSError as error:
                where = f"{self.path} at byte {offset + done}"
                raise CheckpointError(f"reading {where} failed: {error.strerror}.") from error
            if not part:
                raise self._cut_short(offset, size_bytes)
            parts.append(part)
            done += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def stream(self) -> BinaryIO:
        """Return a stream of the file's bytes, for code that needs one. The caller closes it."""
        return os.fdopen(os.dup(self._descriptor), "rb")

    def _cut_short(self, offset: int, size_bytes: int) -> CheckpointError:
        now = os.fstat(self._descriptor).st_size
        message = f"{self.path} ends at byte {now}, but bytes {offset} to {offset + size_bytes} were to be read: it "
        if now >= self.size_bytes:
            return CheckpointError(message + "is damaged or was cut short. Copy it again.")
        return CheckpointError(
            f"{message}was cut short after it was opened with {self.size_bytes} bytes. Nothing may write to a "
            "checkpoint while it is read; copy it again."
        )

    def __repr__(self) -> str:
        return f"DataFile({self.name!r})"


class HeldBytes:
    """Bytes of a tensor in memory, for formats that cannot be read in parts.

    Args:
        name: The name of the bytes in messages.
        tensor: A contiguous tensor on the CPU.
    """

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name = name
        self.number = next(_numbers)
        self.size_bytes = tensor.numel() * tensor.element_size()
        self._tensor = tensor.detach()

    def read_into(self, address: int, size_bytes: int, offset: int) -> None:
        """Copy bytes to memory."""
        assert offset + size_bytes <= self.size_bytes
        ctypes.memmove(address, self._tensor.data_ptr() + offset, size_bytes)

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Return bytes."""
        assert offset + size_bytes <= self.size_bytes
        return ctypes.string_at(self._tensor.data_ptr() + offset, size_bytes)


def first_bytes(path: Path, size_bytes: int) -> bytes:
    """Return the first bytes of a file, or no bytes if the file cannot be read."""
    try:
        file = DataFile(path)
        return file.read(0, min(size_bytes, file.size_bytes))
    except CheckpointError:
        return b""
