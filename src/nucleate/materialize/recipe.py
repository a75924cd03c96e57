"""Recipes: how the content of one storage is made, from the record of its construction."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nucleate.deferred import Given, Pieces, Record
from nucleate.deferred.elements import take
from nucleate.deferred.replay import backward_slice
from nucleate.deferred.tape import Step
from nucleate.devices import move


def is_moved_to(record: Record, device: torch.device) -> bool:
    """Return whether what was recorded is made on the CPU and then moved to a device."""
    return record.device.type == "cpu" != device.type


def moved_to(
    device: torch.device, made: torch.UntypedStorage, scratch: torch.UntypedStorage | None = None
) -> torch.UntypedStorage:
    """Return a storage on a device with the content of one on the CPU; it may be `scratch` instead of new memory."""
    storage = scratch if scratch is not None else torch.UntypedStorage(made.nbytes(), device=device)
    move(made, storage)
    return storage


def pieces_on_host(record: Record, storage: int, end: int | None = None) -> Pieces | None:
    """Return how ranges of a storage are made on the CPU, or None if it can only be made whole.

    The CPU does not draw or compute what was recorded for another device: the bits would be others.

    Args:
        record: The record.
        storage: The storage's number on the record's tape.
        end: As it was before the step with this index; by default, as it is at the end.
    """
    pieces = record.pieces(storage, end)
    return pieces if pieces is not None and (record.device.type == "cpu" or pieces.is_on_host) else None


@dataclass(frozen=True, slots=True)
class Recipe:
    """A storage made by replaying how the constructor made it.

    Attributes:
        record: The record of the construction.
        storage: The storage's number on the record's tape.
    """

    record: Record
    storage: int

    def make(self, device: torch.device, scratch: torch.UntypedStorage | None = None) -> torch.UntypedStorage:
        """Replay the storage's recipe: on `device`, or on the CPU if it was recorded for that, and move the result."""
        if not is_moved_to(self.record, device):
            return self.record.make(self.storage, device, scratch)
        tape = self.record.tape
        made = None if scratch is not None else tape.made(self.storage)
        if made is None or made.device.type != device.type or device.index not in (None, made.device.index):
            made = moved_to(device, self.record.replayer.storage(self.storage, self.record.device), scratch)
            if scratch is None:
                tape.keep_made(self.storage, made)
        return made

    def pieces(self, device: torch.device) -> Pieces | None:
        """Return how ranges are made on the CPU, which moves them to `device`; None where they cannot be."""
        return pieces_on_host(self.record, self.storage)

    def given(self) -> Given | None:
        """Return what the storage is given from a file, if that is all its recipe does."""
        pieces = self.record.pieces(self.storage)
        return None if pieces is None else pieces.given()

    def conversion(self) -> Step | None:
        """Return the recorded conversion that the storage is an output of, if it is one and was not made before."""
        return self.record.converted(self.storage) if self.record.tape.made(self.storage) is None else None

    def keep(self, storage: torch.UntypedStorage) -> None:
        """Let tensors that share the storage and are made later share this memory."""
        self.record.tape.keep_made(self.storage, storage)

    @property
    def size_bytes(self) -> int:
        """How large the storage is."""
        return self.record.tape.size_bytes(self.storage)

    @property
    def origin(self) -> str:
        """Say who makes the content: the constructor, a checkpoint, or a method that was called for it."""
        tape = self.record.tape
        steps = backward_slice(tape, [self.storage])
        if any(step.func is take for step in steps):
            return "checkpoint"
        # A cast by the precision has made another storage of it.
        touched = {storage for step in reversed(steps) for storage in (*step.creates, *step.writes)}
        return next((tape.writer_names[s] for s in sorted(touched) if s in tape.writer_names), "constructor")

    @property
    def order(self) -> int:
        """The last step that wrote it: random steps then follow one another as in the constructor."""
        return self.record.tape.writers(self.storage)[-1]
