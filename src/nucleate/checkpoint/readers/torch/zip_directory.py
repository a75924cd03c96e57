"""The directory of a zip archive, as `torch.save` writes it: where each record's bytes lie in the file.

Only what torch writes is read: records that are stored as they are, a directory at the very end. The `zipfile` module
does more and takes ten times as long, which counts where each of thousands of tensors is an archive of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from nucleate.errors import CheckpointError

_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")


@dataclass(frozen=True, slots=True)
class Record:
    """A file inside of the archive.

    Attributes:
        offset: Where its bytes begin in the archive.
        size_bytes: How many there are.
    """

    offset: int
    size_bytes: int


class ZipDirectory:
    """The records of one archive, by name.

    Args:
        read: Returns bytes of the archive, given an offset in it and how many.
        size_bytes: How long the archive is.
        name: What messages call it.

    Raises:
        CheckpointError: It is damaged, or was not written by torch.
    """

    def __init__(self, read: Callable[[int, int], bytes], size_bytes: int, name: str) -> None:
        self._read = read
        self._size_bytes = size_bytes
        self._name = name
        # Where the header of each record is, how long the record is, and whether it is packed.
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

    def record(self, name: str) -> Record:
        """Return where a record lies.

        Raises:
            CheckpointError: There is no such record, or it is damaged.
        """
        if name not in self._headers:
            raise self.damaged(f"it has no record {name}")
        header_offset, size_bytes, is_packed = self._headers[name]
        if is_packed:
            raise CheckpointError(
                f"{self._name} is a compressed or encrypted archive (record {name[:100]!r}), which torch does not "
                "write. Unpack it, or save it again with `torch.save`."
            )
        if header_offset + _LOCAL.size > self._size_bytes:
            raise self.damaged(f"its record {name} begins at byte {header_offset} of {self._size_bytes}")
        header = _LOCAL.unpack(self._read(header_offset, _LOCAL.size))
        offset = header_offset + _LOCAL.size + header[9] + header[10]
        if header[0] != b"PK\x03\x04" or offset + size_bytes > self._size_bytes:
            raise self.damaged(f"its record {name} is not where its directory says")
        return Record(offset, size_bytes)

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
                    raise ValueError(f"its end is said to be at byte {end_offset}")
                end_64 = _END_64.unpack(self._read(end_offset, _END_64.size))
                if end_64[0] != b"PK\x06\x06":
                    raise ValueError("its end is not where it should be")
                num_entries, size_bytes, offset = end_64[7], end_64[8], end_64[9]
        if offset + size_bytes > end_offset or num_entries * _ENTRY.size > size_bytes:
            raise ValueError(f"{num_entries} entries are said to be in {size_bytes} bytes at {offset}")
        directory = self._read(offset, size_bytes)
        place = 0
        for _ in range(num_entries):
            place = self._read_entry(directory, place)

    def _read_entry(self, directory: bytes, place: int) -> int:
        """Note the entry at `place`, and return where the next one is."""
        entry = _ENTRY.unpack_from(directory, place)
        flags, method, packed_bytes, size_bytes = entry[3], entry[4], entry[8], entry[9]
        name_end = place + _ENTRY.size + entry[10]
        extra_end = name_end + entry[11]
        end: int = extra_end + entry[12]
        if entry[0] != b"PK\x01\x02" or end > len(directory):
            raise ValueError(f"no entry is at byte {place} of it")
        name: str = directory[place + _ENTRY.size : name_end].decode("utf-8")
        header_offset = entry[16]
        if 0xFFFFFFFF in (packed_bytes, size_bytes, header_offset):
            packed_bytes, size_bytes, header_offset = _long_fields(
                directory[name_end:extra_end], packed_bytes, size_bytes, header_offset
            )
        if name in self._headers:
            raise ValueError(f"{name[:100]!r} stands in it twice")
        self._headers[name] = header_offset, size_bytes, bool(method or flags & 1 or packed_bytes != size_bytes)
        return end


def _long_fields(extra: bytes, packed_bytes: int, size_bytes: int, header_offset: int) -> tuple[int, int, int]:
    """Return the fields of an entry, those that do not fit into 4 bytes from its extra field."""
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
    raise ValueError("an entry of more than 4 GiB does not say how long it is")
