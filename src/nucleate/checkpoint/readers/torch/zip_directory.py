"""The directory of a zip archive, as `torch.save` writes it: the place of each record's bytes in the file.

This module reads only archives as torch writes them: the records are not compressed, and the directory is at the very
end. The `zipfile` module does more and takes ten times as long. That matters if each of thousands of tensors has its
own archive.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from nucleate.errors import CheckpointError, CheckpointUnreadableError

_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
# The directory of ten million records.
_MAX_DIRECTORY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """A file inside of the archive.

    Attributes:
        offset: The place in the archive where its bytes begin.
        size_bytes: The number of its bytes.
    """

    offset: int
    size_bytes: int


class ZipDirectory:
    """The records of one archive, by name.

    Args:
        read: Returns bytes of the archive, given an offset and a length.
        size_bytes: The length of the archive.
        name: The name of the archive in messages.

    Raises:
        CheckpointError: The archive is damaged, or torch did not write it.
    """

    def __init__(self, read: Callable[[int, int], bytes], size_bytes: int, name: str) -> None:
        self._read = read
        self._size_bytes = size_bytes
        self._name = name
        # The place of each record's header, the length of the record, and whether the record is packed.
        self._headers: dict[str, tuple[int, int, bool]] = {}
        try:
            self._read_directory()
        except (struct.error, ValueError) as error:
            raise self.damaged(f"its directory cannot be read ({error})") from error

    def damaged(self, what: str) -> CheckpointError:
        """Return the error that says `what` is wrong with the archive."""
        return CheckpointError(f"{self._name} is damaged: {what}. Copy it again.")

    def __contains__(self, name: str) -> bool:
        return name in self._headers

    def names(self) -> list[str]:
        """Return the names of all records."""
        return list(self._headers)

    def record(self, name: str) -> ZipEntry:
        """Return the place of a record.

        Raises:
            CheckpointError: The archive does not have the record, or the record is damaged.
        """
        if name not in self._headers:
            raise self.damaged(f"it has no record {name[:100]}")
        header_offset, size_bytes, is_packed = self._headers[name]
        if is_packed:
            raise CheckpointUnreadableError(
                f"{self._name} is a compressed or encrypted archive (record {name[:100]!r}), which torch does not "
                "write. Unpack it, or save it again with `torch.save`."
            )
        if header_offset + _LOCAL.size > self._size_bytes:
            raise self.damaged(f"its record {name[:100]} begins at byte {header_offset} of {self._size_bytes}")
        header = _LOCAL.unpack(self._read(header_offset, _LOCAL.size))
        offset = header_offset + _LOCAL.size + header[9] + header[10]
        if header[0] != b"PK\x03\x04" or offset + size_bytes > self._size_bytes:
            raise self.damaged(f"its record {name[:100]} is not where its directory says")
        return ZipEntry(offset, size_bytes)

    def _read_directory(self) -> None:
        if self._size_bytes < _END.size:
            raise ValueError(f"it has {self._size_bytes} bytes")
        end_offset = self._size_bytes - _END.size
        end = _END.unpack(self._read(end_offset, _END.size))
        if end[0] != b"PK\x05\x06":
            raise ValueError("its end is missing: it was cut short, or something was added to it")
        num_entries, size_bytes, offset = end[4], end[5], end[6]
        locator_offset = end_offset - _LOCATOR.size
        if locator_offset >= 0:
            locator = _LOCATOR.unpack(self._read(locator_offset, _LOCATOR.size))
            if locator[0] == b"PK\x06\x07":
                end_offset = locator[2]
                if end_offset > locator_offset - _END_64.size:
                    raise ValueError(f"it places its end at byte {end_offset}")
                end_64 = _END_64.unpack(self._read(end_offset, _END_64.size))
                if end_64[0] != b"PK\x06\x06":
                    raise ValueError("its end is not where it should be")
                num_entries, size_bytes, offset = end_64[7], end_64[8], end_64[9]
        if offset + size_bytes > end_offset or num_entries * _ENTRY.size > size_bytes:
            raise ValueError(f"it places {num_entries} entries in {size_bytes} bytes at {offset}")
        first = self._read(offset, min(4, size_bytes))
        if size_bytes > _MAX_DIRECTORY_BYTES or (num_entries and first != b"PK\x01\x02"):
            raise ValueError(f"it has no directory of {size_bytes} bytes at byte {offset}")
        directory = self._read(offset, size_bytes)
        place = 0
        for _ in range(num_entries):
            place = self._read_entry(directory, place)

    def _read_entry(self, directory: bytes, place: int) -> int:
        """Note the entry at `place`, and return the place of the next entry."""
        entry = _ENTRY.unpack_from(directory, place)
        flags, method, packed_bytes, size_bytes = entry[3], entry[4], entry[8], entry[9]
        name_end = place + _ENTRY.size + entry[10]
        extra_end = name_end + entry[11]
        end: int = extra_end + entry[12]
        if entry[0] != b"PK\x01\x02" or end > len(directory):
            raise ValueError(f"it has no entry at its byte {place}")
        name: str = directory[place + _ENTRY.size : name_end].decode("utf-8")
        header_offset = entry[16]
        if 0xFFFFFFFF in (packed_bytes, size_bytes, header_offset):
            packed_bytes, size_bytes, header_offset = _long_fields(
                directory[name_end:extra_end], packed_bytes, size_bytes, header_offset
            )
        if name in self._headers:
            raise ValueError(f"it holds {name[:100]!r} twice")
        self._headers[name] = header_offset, size_bytes, bool(method or flags & 1 or packed_bytes != size_bytes)
        return end


def _long_fields(extra: bytes, packed_bytes: int, size_bytes: int, header_offset: int) -> tuple[int, int, int]:
    """Return the fields of an entry. Fields that do not fit into 4 bytes come from its extra field."""
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        place += 4
        if kind == 1:
            fields = []
            for number in (size_bytes, packed_bytes, header_offset):
                if number == 0xFFFFFFFF:
                    (number,) = struct.unpack_from("<Q", extra, place)
                    place += 8
                fields.append(number)
            return fields[1], fields[0], fields[2]
        place += length
    raise ValueError("an entry of more than 4 GiB does not contain its length")
