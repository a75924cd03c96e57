"""Recipes: each one makes the content of one storage from the recording of its construction."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nucleate.deferred import ElementSource, RangeMaker, Record
from nucleate.deferred.elements import fill_from
from nucleate.deferred.replay import backward_slice
from nucleate.deferred.tape import Step
from nucleate.devices import move


def is_moved_to(record: Record, device: torch.device) -> bool:
    """Return whether recorded values are made on the CPU and then moved to a device."""
    return record.device.type == "cpu" != device.type


def moved_to(
    device: torch.device, made: torch.UntypedStorage, scratch: torch.UntypedStorage | None = None
) -> torch.UntypedStorage:
    """Copy a storage on the CPU to a device, into `scratch` or else into new memory, and return the copy."""
    storage = scratch if scratch is not None else torch.UntypedStorage(made.nbytes(), device=device)
    move(made, storage)
    return storage


def maker_on_host(record: Record, storage: int, end: int | None = None) -> RangeMaker | None:
    """Return the maker of a storage's ranges on the CPU, or None if the storage can only be made whole.

    The CPU does not draw or compute values that were recorded for another device, because the bits would differ.

    Args:
        record: The recording.
        storage: The storage's number on the recording's tape.
        end: The index of a step: make the content before this step. By default, make the content at the end.
    """
    maker = record.maker(storage, end)
    return maker if maker is not None and (record.device.type == "cpu" or maker.is_on_host) else None


@dataclass(frozen=True, slots=True)
class Recipe:
    """The recipe of one storage: a replay of the operations by which the constructor made it.

    Attributes:
        record: The recording of the construction.
        storage: The storage's number on the recording's tape.
    """

    record: Record
    storage: int

    def make(self, device: torch.device, scratch: torch.UntypedStorage | None = None) -> torch.UntypedStorage:
        """Replay the recipe on `device`, or on the CPU if it was recorded for the CPU, and move the result."""
        if not is_moved_to(self.record, device):
            return self.record.make(self.storage, device, scratch)
        tape = self.record.tape
        made = None if scratch is not None else tape.made(self.storage)
        if made is None or made.device.type != device.type or device.index not in (None, made.device.index):
            made = moved_to(device, self.record.replayer.storage(self.storage, self.record.device), scratch)
            if scratch is None:
                tape.keep_made(self.storage, made)
        return made

    def maker(self, device: torch.device) -> RangeMaker | None:
        """Return the maker of ranges on the CPU, for `device`, or None if the storage can only be made whole."""
        return maker_on_host(self.record, self.storage)

    def given(self) -> ElementSource | None:
        """Return the element source that the storage is read from, if the recipe does nothing else."""
        maker = self.record.maker(self.storage)
        return None if maker is None else maker.given()

    def conversion(self) -> Step | None:
        """Return the recorded conversion that makes the storage, if one does and the storage was not made before."""
        return self.record.converted(self.storage) if self.record.tape.made(self.storage) is None else None

    def keep(self, storage: torch.UntypedStorage) -> None:
        """Keep the memory for tensors that share the storage and are made later."""
        self.record.tape.keep_made(self.storage, storage)

    @property
    def size_bytes(self) -> int:
        """The size of the storage in bytes."""
        return self.record.tape.size_bytes(self.storage)

    @property
    def origin(self) -> str:
        """The origin of the content: the constructor, a checkpoint, or a method that was called for it."""
        tape = self.record.tape
        steps = backward_slice(tape, [self.storage])
        if any(step.func is fill_from for step in steps):
            return "checkpoint"
        # A cast by the precision makes another storage, so the storages before the cast count as well.
        touched = {storage for step in reversed(steps) for storage in (*step.creates, *step.writes)}
        return next((tape.writer_names[s] for s in sorted(touched) if s in tape.writer_names), "constructor")

    @property
    def order(self) -> int:
        """The last step that wrote the storage. In this order, random steps have the order of the constructor."""
        return self.record.tape.writers(self.storage)[-1]
