"""Check sums of torch files, which all zip archives have: they show that bits have changed on the way.

`torch.load` does not check them. Safetensors files have no check sums.
"""

from __future__ import annotations

import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nucleate.checkpoint.stored.data_file import DataFile
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.checkpoint.tools.sweep import RANGE_BYTES

_HEADER_BYTES = 30  # of a record, before its name


@dataclass(frozen=True)
class SummedRecord:
    """A record of an archive that has a check sum.

    Attributes:
        file: The archive.
        offset: The first byte of the record's data in the file.
        size_bytes: The size of the data.
        check_sum: The CRC-32 of the data when it was written.
        keys: The tensors that lie in the record.
    """

    file: DataFile
    offset: int
    size_bytes: int
    check_sum: int
    keys: tuple[str, ...]

    def parts(self) -> Iterator[int]:
        """Read the record, and yield the number of bytes after each read.

        Raises:
            ValueError: The bytes have changed since they were written.
        """
        found = 0
        for begin in range(self.offset, self.offset + self.size_bytes, RANGE_BYTES):
            wanted = min(RANGE_BYTES, self.offset + self.size_bytes - begin)
            found = zlib.crc32(self.file.read(begin, wanted), found)
            yield wanted
        if found != self.check_sum:
            raise ValueError(
                f"bytes {self.offset} to {self.offset + self.size_bytes} of {self.file.name} have the CRC-32 "
                f"{found:08x}, but had {self.check_sum:08x} when they were written: some bits have changed. Copy the "
                "file again."
            )


def summed_records(tensors: Iterable[StoredTensor]) -> list[SummedRecord]:
    """Return the records of all archives that tensors lie in, without those that have no check sum."""
    files: dict[int, DataFile] = {}
    places: dict[int, list[tuple[int, str]]] = {}
    for stored in tensors:
        for chunk in stored.chunks:
            if isinstance(chunk.file, DataFile):
                files[chunk.file.number] = chunk.file
                places.setdefault(chunk.file.number, []).append((chunk.offset, stored.key))
    records: list[SummedRecord] = []
    for number, file in files.items():
        records += _of_file(file, sorted(places[number]))
    return records


def _of_file(file: DataFile, places: list[tuple[int, str]]) -> Iterator[SummedRecord]:
    try:
        with file.stream() as stream, zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, OSError):
        return  # Not an archive: a torch file from before 1.6.
    for info in infos:
        # `torch.serialization.set_crc32_options(False)` turns check sums off, and the archive then has 0.
        if not info.CRC or info.compress_type != zipfile.ZIP_STORED:
            continue
        head = file.read(info.header_offset, _HEADER_BYTES)
        names = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        begin = info.header_offset + _HEADER_BYTES + names
        first = bisect_right(places, (begin, ""))
        keys = []
        for offset, key in places[first:]:
            if offset >= begin + info.file_size:
                break
            keys.append(key)
        yield SummedRecord(file, begin, info.file_size, info.CRC, tuple(dict.fromkeys(keys)))
