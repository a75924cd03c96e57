"""Which part of a storage something ever wrote: what eager construction leaves as heap memory is found here."""

from __future__ import annotations

import torch

from nucleate.deferred.tape import Tape, TensorRef


def num_unwritten_bytes(tape: Tape, storage: int) -> int:
    """Return how many bytes of a storage no step ever wrote.

    Args:
        tape: The tape.
        storage: The storage's number on it.
    """
    size_bytes = tape.size_bytes(storage)
    parts: list[TensorRef] = []
    for index in reversed(tape.writers(storage)):
        step = tape.steps[index]
        if storage in step.overwrites or (storage in step.creates and not step.uninitialized):
            return 0
        parts.extend(ref for ref in step.written if ref.storage == storage)
    if size_bytes == 0 or any(ref.fills(size_bytes) for ref in parts):
        return 0
    # Parts only: mark what each one touches, a byte per byte. Rare, and never more than one storage at a time.
    mark = torch.zeros(size_bytes, dtype=torch.bool)
    for ref in parts:
        width = ref.dtype.itemsize
        elements = mark[: size_bytes - size_bytes % width].view(-1, width)
        elements.as_strided((*ref.size, width), (*(s * width for s in ref.stride), 1), ref.offset * width).fill_(True)
    return size_bytes - int(mark.sum())
