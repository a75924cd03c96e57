"""The bytes of a file that a big-endian machine wrote, with the bytes of each number in the order of this machine."""

from __future__ import annotations

import ctypes

import torch

from nucleate.checkpoint.stored.data_file import Bytes


class SwappedBytes:
    """Bytes whose numbers are turned round while they are read, as `UntypedStorage.byteswap` does in `torch.load`.

    Args:
        file: The bytes in the order of the other machine.
        item_bytes: The number of bytes of each number. A complex number consists of two numbers.

    Attributes:
        name: The name of the bytes in messages.
        number: See `Bytes`.
        size_bytes: The number of bytes.
    """

    def __init__(self, file: Bytes, item_bytes: int) -> None:
        self.name, self.number, self.size_bytes = file.name, file.number, file.size_bytes
        self._file = file
        self._item_bytes = item_bytes

    def read_into(self, address: int, size_bytes: int, offset: int) -> None:
        """Copy whole numbers to memory; see `Bytes`."""
        self._file.read_into(address, size_bytes, offset)
        if size_bytes:
            memory = torch.frombuffer((ctypes.c_uint8 * size_bytes).from_address(address), dtype=torch.uint8)
            self._swap(memory)

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Return whole numbers as bytes; see `Bytes`."""
        memory = bytearray(self._file.read(offset, size_bytes))
        if memory:
            self._swap(torch.frombuffer(memory, dtype=torch.uint8))
        return bytes(memory)

    def _swap(self, memory: torch.Tensor) -> None:
        numbers = memory.view(-1, self._item_bytes)
        numbers.copy_(numbers.flip(1))
