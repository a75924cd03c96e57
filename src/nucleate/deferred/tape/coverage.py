"""Coverage: the part of a storage that steps wrote; eager construction leaves uninitialized memory in the rest."""

from __future__ import annotations

import torch

from nucleate.deferred.tape.steps import TensorRef
from nucleate.deferred.tape.tape import Tape


def is_written(tape: Tape, seen: TensorRef) -> bool:
    """Return whether steps wrote every element of a tensor.

    Args:
        tape: The tape.
        seen: The tensor.
    """
    storage = seen.storage
    size_bytes = tape.size_bytes(storage)
    parts: list[TensorRef] = []
    for index in reversed(tape.writers(storage)):
        step = tape.steps[index]
        if storage in step.overwrites or (storage in step.creates and not step.uninitialized):
            return True
        parts.extend(ref for ref in step.written if ref.storage == storage)
    if size_bytes == 0 or any(ref.fills(size_bytes) for ref in parts):
        return True
    spans = sorted(span for span in map(_span, parts) if span is not None)
    reached = 0
    for start, end in spans:
        if start > reached:
            break
        reached = max(reached, end)
    if reached >= size_bytes:
        return True
    # Some parts are not contiguous: mark the elements of each part. This is rare and takes a byte for each element.
    width = min(ref.dtype.itemsize for ref in (seen, *parts))
    mark = torch.zeros(size_bytes // width, dtype=torch.bool)

    def elements(ref: TensorRef) -> torch.Tensor:
        words = ref.dtype.itemsize // width
        return mark.as_strided((*ref.size, words), (*(s * words for s in ref.stride), 1), ref.offset * words)

    for ref in parts:
        elements(ref).fill_(True)
    return bool(elements(seen).all())


def _span(ref: TensorRef) -> tuple[int, int] | None:
    """Return the first byte of a contiguous tensor and the byte behind its last one, or None for any other tensor."""
    if not TensorRef(0, ref.dtype, ref.size, ref.stride, 0, False, False).fills(ref.numel * ref.dtype.itemsize):
        return None
    start = ref.offset * ref.dtype.itemsize
    return start, start + ref.numel * ref.dtype.itemsize
