"""Writing of boxes to their places in files: every rank writes its own boxes, directly from memory if it can.

This file decides how bytes reach the disk. A format decides the place of each tensor.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from nucleate.checkpoint.disk.system_calls import system_call
from nucleate.checkpoint.saving.moved import MovedBox
from nucleate.checkpoint.saving.rank_share import SavedTensor
from nucleate.checkpoint.writers.allocation import failure
from nucleate.cluster.save_group import SaveGroup
from nucleate.deferred import ElementSource
from nucleate.deferred.elements import fill_range_from
from nucleate.errors import CheckpointError, RankDisagreementError
from nucleate.layout import runs
from nucleate.report.meter import Meter

#: The bytes that one thread copies at a time from a tensor that cannot be written directly from memory.
STAGING_BYTES = 16 << 20
#: The bytes that one thread reads at a time from a tensor that is in another file.
_READ_BYTES = 4 << 20
_MAX_THREADS = 4


#: A function that writes a part of a box and returns the number of bytes, and the file's name for messages.
_Slab: TypeAlias = "tuple[Callable[[], int], str]"


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a tensor in a draft.

    Attributes:
        file: The name of the file in the draft; empty if the draft is the file.
        offset: The first element's place in the file, in bytes.
        dtype: The tensor's dtype.
        shape: The tensor's shape.
    """

    file: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def write_tensors(
    tensors: Sequence[SavedTensor],
    places: Mapping[str, Place],
    draft: Path,
    group: SaveGroup,
    what: str,
    moved: Sequence[MovedBox] = (),
) -> None:
    """Write this rank's boxes to their places on disk, on all ranks together.

    Args:
        tensors: The tensors with this rank's boxes.
        places: The place of each tensor, by key; the same on every rank.
        draft: The folder of the files, or the only file. Each file has its full size already.
        group: The ranks.
        what: The activity, for messages, such as `"writing step-1"`.
        moved: This rank's boxes whose elements go to places in other tensors.

    Raises:
        CheckpointError: Writing failed, or the ranks together do not hold every element exactly once.
        RankDisagreementError: This rank's tensors differ from the tensors of `places`.
        RankFailedError: Writing failed on another rank.
    """
    with group.all_or_none(what):
        _check(tensors, places)
        written = _write_all(tensors, places, draft, moved)
    held = sum(group.gather_objects(written))
    wanted = sum(math.prod(place.shape) * place.dtype.itemsize for place in places.values())
    if held != wanted:
        raise CheckpointError(
            f"{what}: the ranks together hold {held} bytes, but the tensors have {wanted}. No rank holds some part "
            "of a tensor, or two ranks hold the same part and both write it."
        )


def _check(tensors: Sequence[SavedTensor], places: Mapping[str, Place]) -> None:
    for held in tensors:
        place = places.get(held.key)
        if held.boxes and (place is None or (place.dtype, place.shape) != (held.dtype, held.shape)):
            there = "missing" if place is None else f"{place.dtype} {place.shape}"
            raise RankDisagreementError(
                f"{held.key} is {held.dtype} {held.shape} here but {there} on rank 0. Every rank must save the same."
            )


def _write_all(
    tensors: Sequence[SavedTensor], places: Mapping[str, Place], draft: Path, moved: Sequence[MovedBox]
) -> int:
    """Write everything, and return the number of bytes written."""
    names = dict.fromkeys(places[held.key].file for held in tensors if held.boxes)
    if moved:
        names = dict.fromkeys(place.file for place in places.values())
    descriptors: dict[str, int] = {}
    try:
        for name in names:
            path = draft / name if name else draft
            try:
                descriptors[name] = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            except OSError as error:
                raise failure(path, error) from error
        slabs: Iterator[_Slab] = (
            (functools.partial(_write_slab, slab, begin, place, descriptors[place.file], box.given), place.file)
            for held in tensors
            for box in held.boxes
            for place in (places[held.key],)
            for slab, begin in _slabs(
                box.values,
                box.begin,
                (STAGING_BYTES if box.given is None else _READ_BYTES) // held.dtype.itemsize,
            )
        )
        scattered: Iterator[_Slab] = (
            (functools.partial(_scatter_slab, slab, begin, box, places, descriptors), "")
            for box in moved
            for slab, begin in _slabs(box.values, box.begin, STAGING_BYTES // box.values.element_size())
        )
        size_bytes = sum(held.held_bytes for held in tensors)
        size_bytes += sum(box.values.numel() * box.values.element_size() for box in moved)
        with Meter(size_bytes, "writing") as meter:
            written = _in_threads(itertools.chain(slabs, scattered), draft, meter)
        for name, descriptor in descriptors.items():
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise failure(draft / name if name else draft, error) from error
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return written


def _in_threads(slabs: Iterator[_Slab], draft: Path, meter: Meter) -> int:
    """Write the slabs in a few plain threads. An executor accepts no work while the interpreter ends."""
    lock = threading.Lock()
    failures: list[BaseException] = []
    written = [0]

    def work() -> None:
        try:
            while not failures:
                with lock:
                    item = next(slabs, None)
                if item is None:
                    return
                work_off, file = item
                try:
                    size_bytes = work_off()
                except OSError as error:
                    raise failure(draft / file if file else draft, error) from error
                with lock:
                    written[0] += size_bytes
                meter.add(size_bytes)
        except BaseException as error:
            failures.append(error)

    others = [threading.Thread(target=work, name="nucleate-write") for _ in range(_num_threads() - 1)]
    for thread in others:
        thread.start()
    work()
    for thread in others:
        thread.join()
    if failures:
        raise failures[0]
    return written[0]


def _num_threads() -> int:
    try:
        return max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0))))
    except AttributeError:  # macOS does not have it.
        return max(1, min(_MAX_THREADS, os.cpu_count() or 1))


def _slabs(values: Tensor, begin: tuple[int, ...], limit: int) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Yield parts of a box in order, each with at most `limit` elements and with its first index in the tensor."""
    if values.numel() <= limit:
        if values.numel():
            yield values, begin
        return
    dim = next(dim for dim, length in enumerate(values.shape) if length > 1)
    step = max(1, limit // (values.numel() // values.shape[dim]))
    for first in range(0, values.shape[dim], step):
        rows = values.narrow(dim, first, min(step, values.shape[dim] - first))
        yield from _slabs(rows, (*begin[:dim], begin[dim] + first, *begin[dim + 1 :]), limit)


def _write_slab(
    slab: Tensor, begin: tuple[int, ...], place: Place, descriptor: int, given: ElementSource | None
) -> int:
    itemsize = place.dtype.itemsize
    if given is not None:
        _copy_slab(given, slab, begin, place, descriptor)
        return slab.numel() * itemsize
    plain = _plain(slab)
    address = plain.data_ptr()
    for offset, numel in runs(begin, tuple(slab.shape), place.shape):
        _pwrite(descriptor, address, numel * itemsize, place.offset + offset * itemsize)
        address += numel * itemsize
    return slab.numel() * itemsize


def _plain(slab: Tensor) -> Tensor:
    # The order matters: an accelerator's conjugated tensor is resolved on the accelerator.
    return slab.detach().resolve_conj().resolve_neg().contiguous().cpu()


def _scatter_slab(
    slab: Tensor,
    begin: tuple[int, ...],
    box: MovedBox,
    places: Mapping[str, Place],
    descriptors: Mapping[str, int],
) -> int:
    """Write the elements of a part of a box to their places in other tensors."""
    plain, done, written = _plain(slab).view(-1), 0, 0

    def put(key: str, start: int, values: Tensor) -> None:
        nonlocal written
        place = places[key]
        size_bytes = values.numel() * place.dtype.itemsize
        offset = place.offset + start * place.dtype.itemsize
        _pwrite(descriptors[place.file], values.data_ptr(), size_bytes, offset)
        written += size_bytes

    for offset, numel in runs(begin, tuple(slab.shape), box.shape):
        box.scatter(offset, plain[done : done + numel], put)
        done += numel
    return written


def _copy_slab(given: ElementSource, slab: Tensor, begin: tuple[int, ...], place: Place, descriptor: int) -> None:
    """Write elements of an element source. The slab gives only their shape."""
    for offset, numel in runs(begin, tuple(slab.shape), place.shape):
        plain = torch.empty(numel, dtype=place.dtype, device="cpu")
        fill_range_from(plain, given, offset)
        _pwrite(
            descriptor, plain.data_ptr(), numel * place.dtype.itemsize, place.offset + offset * place.dtype.itemsize
        )


def _pwrite(descriptor: int, address: int, size_bytes: int, offset: int) -> None:
    done = 0
    while done < size_bytes:
        # The limit is below the most that the system writes in one call (write(2): 0x7ffff000 bytes).
        count = system_call("pwrite")(descriptor, address + done, min(size_bytes - done, 1 << 30), offset + done)
        if count > 0:
            done += count
            continue
        number = ctypes.get_errno() if count < 0 else errno.ENOSPC
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
