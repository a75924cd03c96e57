"""A CSV file that grows by rows and by columns, and is whole whenever the process is killed.

Each row is written at once, at the end of the file. A new column changes all lines, so the file is then written anew
under another name and takes the old file's place. A line that a killed process did not finish is removed when the next
process opens the file.
"""

from __future__ import annotations

import csv
import io
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any


class CSVFile:
    """A CSV file with a header. A file that is there is continued.

    Args:
        path: The file.
        sync_every: After how many rows the file is forced to the disk, so that they also survive a crash of the
            machine.
    """

    def __init__(self, path: Path, sync_every: int) -> None:
        self.path = path
        self._sync_every = sync_every
        self._unsynced = 0
        self._columns: list[str] = []
        #: The last row that an earlier process has written.
        self.last_row: dict[str, str] = {}
        if path.exists():
            _remove_torn_line(path)
            self._read()
        self._file = self._open()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row. Columns that the file does not have yet are added."""
        added = [column for column in row if column not in self._columns]
        if added:
            self._add_columns(added)
        self._file.write(_line([row.get(column, "") for column in self._columns]))
        # To the operating system: from there on a killed process loses nothing.
        self._file.flush()
        self._unsynced += 1
        if self._unsynced >= self._sync_every:
            self.sync()

    def sync(self) -> None:
        """Force all rows to the disk."""
        if self._unsynced:
            os.fsync(self._file.fileno())
            self._unsynced = 0

    def close(self) -> None:
        """Force all rows to the disk, and close the file."""
        self.sync()
        self._file.close()

    def _open(self) -> IO[str]:
        file = open(self.path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - open as long as this object lives
        # Not at exit: the loggers of a runtime end there, and still need the file.
        weakref.finalize(self, file.close).atexit = False
        return file

    def _read(self) -> None:
        with open(self.path, encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            self._columns = next(reader, [])
            row: list[str] = []
            for row in reader:  # noqa: B007 - the last one counts
                pass
        self.last_row = dict(zip(self._columns, row, strict=False))

    def _add_columns(self, added: Sequence[str]) -> None:
        columns = [*self._columns, *added]
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        with (
            open(temporary, "w", encoding="utf-8", newline="") as target,
            open(self.path, encoding="utf-8", newline="") as source,
        ):
            target.write(_line(columns))
            rows = csv.reader(source)
            next(rows, None)
            target.writelines(_line([*row, *[""] * (len(columns) - len(row))]) for row in rows)
            target.flush()
            os.fsync(target.fileno())
        os.replace(temporary, self.path)
        _sync_folder(self.path.parent)
        self._file.close()
        self._file = self._open()
        self._columns = columns


def _line(cells: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _remove_torn_line(path: Path) -> None:
    """Cut the file after its last line break: a longer line would be continued by the next row."""
    with open(path, "rb+") as file:
        end = position = file.seek(0, os.SEEK_END)
        while position > 0:
            begin = max(0, position - 65536)
            file.seek(begin)
            found = file.read(position - begin).rfind(b"\n")
            if found >= 0:
                position = begin + found + 1
                break
            position = begin
        if position < end:
            file.truncate(position)


def _sync_folder(folder: Path) -> None:
    """Force a renamed file's new name to the disk, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
