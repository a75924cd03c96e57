"""Deferred tensors that are bound to the bytes of a file: a load that happens inside a construction reads nothing.

A library that loads a checkpoint while its model is constructed gets these tensors instead of real ones. Its renaming,
casting, splitting and copying is then recorded like the rest of the constructor, and `setup` reads the bytes.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from nucleate.checkpoint.files import DataFile
from nucleate.checkpoint.stored import StoredTensor
from nucleate.deferred import give, is_recording, record_of
from nucleate.errors import CheckpointError


class StampedFile(DataFile):
    """A file whose bytes must stay as they were when it was opened.

    A replaced file is harmless, because the old one stays open. A file that is written in place is an error, because
    the header that was read before may describe other bytes.

    Args:
        path: The file's path.

    Raises:
        CheckpointNotFoundError: There is no file.
        CheckpointError: It is not a regular file, or it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._written_ns = self.written_ns()

    def read_into(self, address: int, size_bytes: int, offset: int) -> None:
        """Copy bytes to memory.

        Raises:
            CheckpointError: The file was written to, it ends before, or the disk fails.
        """
        super().read_into(address, size_bytes, offset)
        if self.written_ns() != self._written_ns:
            raise CheckpointError(
                f"{self.path} was written to after a model was bound to it inside `init_module`, so its values may be "
                "others by now. Load the model again, and write to the file after `setup`."
            )


def defers(device: torch.device) -> bool:
    """Return whether a tensor that this thread makes now for a device is deferred."""
    return is_recording() and record_of(torch.empty(1, device=device)) is not None


def bound(stored: StoredTensor, device: torch.device) -> Tensor:
    """Return a new deferred tensor whose content is a stored tensor.

    Args:
        stored: The elements and their place in a file.
        device: A device for which this thread defers.
    """
    tensor = torch.empty(stored.shape, dtype=stored.dtype, device=device)
    if stored.numel:
        give(tensor, stored)
    return tensor
