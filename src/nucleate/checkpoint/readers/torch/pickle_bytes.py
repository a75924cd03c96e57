"""The bytes of a pickle, read from front to back."""

from __future__ import annotations

from nucleate.errors import CheckpointError


class EndOfPickleError(CheckpointError):
    """The error for data that ends before its pickle does."""


class PickleBytes:
    """A place in the bytes of a pickle.

    Args:
        data: The bytes that hold the pickle.
        name: The name of the pickle in messages.
        start: The place in `data` where the pickle begins.

    Attributes:
        position: The place of the next byte.
    """

    def __init__(self, data: bytes, name: str, start: int = 0) -> None:
        self.position = start
        self._data = data
        self._name = name

    def _take(self, size_bytes: int) -> bytes:
        end = self.position + size_bytes
        if end > len(self._data):
            raise self._cut_short()
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def _number(self, size_bytes: int) -> int:
        return int.from_bytes(self._take(size_bytes), "little")

    def _line(self) -> str:
        end = self._data.find(b"\n", self.position)
        if end < 0:
            raise self._cut_short()
        return self._take(end + 1 - self.position)[:-1].decode("utf-8")

    def _text(self, size_bytes: int) -> str:
        # Python's names of files may hold halves of characters, and pickle keeps them.
        return self._take(size_bytes).decode("utf-8", "surrogatepass")

    def _cut_short(self) -> EndOfPickleError:
        return EndOfPickleError(f"{self._name} is damaged: its pickle was cut short. Copy it again.")
