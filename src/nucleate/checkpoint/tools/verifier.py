"""Verification of a checkpoint: it reads every byte, reports damage, and compares two of any formats bit for bit.

The readers check the headers. This file decides which damage behind the headers is reported, and when two checkpoints
are equal.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nucleate.checkpoint.disk.address import is_address
from nucleate.checkpoint.disk.series import resolve
from nucleate.checkpoint.readers import open_saved
from nucleate.checkpoint.state.tree import key_of
from nucleate.checkpoint.stored.contents import Contents
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.checkpoint.tools.check_sums import SummedRecord, summed_records
from nucleate.checkpoint.tools.comparison import Comparison, Difference
from nucleate.checkpoint.tools.selection import canonical
from nucleate.checkpoint.tools.sweep import Sweep, in_order
from nucleate.errors import CheckpointError, CheckpointUnreadableError


@dataclass(frozen=True)
class Damage:
    """A fault of a checkpoint.

    Attributes:
        message: The fault, in a sentence.
        key: The damaged tensor; empty if a file or the whole checkpoint is damaged.
        files: The files that the tensor lies in.
    """

    message: str
    key: str = ""
    files: tuple[str, ...] = ()


@dataclass
class TensorCheck:
    """The findings about one tensor.

    Attributes:
        key: The tensor's name; the first one if it is tied.
        dtype: The dtype of its elements.
        shape: Its shape.
        num_nan: The number of NaN elements.
        num_inf: The number of infinite elements.
        sha256: The hash of its bytes, row by row; empty without `hashes`.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    num_nan: int = 0
    num_inf: int = 0
    sha256: str = ""


@dataclass
class VerifyReport:
    """The findings of `verify`.

    Attributes:
        path: The checkpoint.
        format: The name of its reader; empty if the headers could not be read.
        size_bytes: The size of its tensors.
        damage: Its faults.
        tensors: The findings about each readable tensor, by the tensor's first name.
        names: Every name of a tensor to the tensor's first name.
        against: The other checkpoint of a comparison, or None.
        differences: The differences between the two.
        unreadable: The reason, in a sentence, if the checkpoint is of a kind that nucleate does not read. It is then
            not known to be damaged, nor known to be whole.
        not_read: The values that are not plain data, with their kinds. They were neither made nor compared.
        sha256: The hash of names, dtypes, shapes and bytes of all tensors, the same for every format. Empty without
            `hashes`, or if there is damage.
    """

    path: Path
    format: str = ""
    size_bytes: int = 0
    damage: list[Damage] = field(default_factory=list)
    tensors: dict[str, TensorCheck] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    against: Path | None = None
    differences: list[Difference] = field(default_factory=list)
    sha256: str = ""
    unreadable: str = ""
    not_read: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether the checkpoint was read, and there is no damage and no difference."""
        return not self.damage and not self.differences and not self.unreadable

    @property
    def num_nan(self) -> int:
        """The number of NaN elements in all tensors."""
        return sum(check.num_nan for check in self.tensors.values())

    @property
    def num_inf(self) -> int:
        """The number of infinite elements in all tensors."""
        return sum(check.num_inf for check in self.tensors.values())


def verify(
    path: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    hashes: bool = False,
    reader: str | None = None,
) -> VerifyReport:
    """Read a whole checkpoint, and report its faults.

    A few threads with a few MiB each read every byte of every tensor. The report counts NaN and infinite elements;
    they are not damage. A checkpoint is whole, damaged, or of a kind that nucleate does not read.

    Args:
        path: A file or folder of any format.
        against: Another checkpoint of any format. Every tensor is compared by its name, bit for bit, and so is every
            value.
        hashes: Compute a SHA-256 of each tensor and one of all tensors. They do not depend on the format.
        reader: The format's name, if the files do not show it.

    Raises:
        CheckpointNotFoundError: There is nothing at `path` or `against`.
        CheckpointError: The checkpoint to compare with is damaged.
        ConfigurationError: There is no such reader.
    """
    report = VerifyReport(Path(path) if is_address(path) else resolve(path))
    other = None if against is None else canonical(open_saved(against, passes_over=True))
    try:
        contents = canonical(open_saved(path, reader, passes_over=True))
    except CheckpointUnreadableError as error:
        report.unreadable = str(error)
        return report
    except CheckpointError as error:
        report.damage.append(Damage(str(error)))
        return report
    report.path, report.format, report.size_bytes = contents.path, contents.format, contents.size_bytes
    report.names = {key_of(place): key for place, key in contents.keys.items()}
    for each in (contents,) if other is None else (contents, other):
        report.not_read += [f"{key_of(place)} in {each.path} ({one.name})" for place, one in each.objects.items()]
    report.damage += _overlaps(contents)
    comparison = None if other is None else Comparison(contents, other)
    _examine(contents, report, hashes, comparison)
    if comparison is not None:
        report.against = comparison.path
        report.differences = comparison.differences()
    # In the order of the checkpoint, not in the order in which threads finished.
    report.tensors = {key: report.tensors[key] for key in contents.tensors if key in report.tensors}
    if hashes and not report.damage:
        report.sha256 = _digest(report)
    return report


def _examine(contents: Contents, report: VerifyReport, hashes: bool, comparison: Comparison | None) -> None:
    """Read all tensors, and beside them those of another checkpoint."""
    records = summed_records(contents.tensors.values()) if contents.format == "torch" else []
    total_bytes = contents.size_bytes + sum(record.size_bytes for record in records)
    sweep = Sweep(total_bytes, "verifying" if comparison is None else "comparing")

    def examine(stored: StoredTensor) -> None:
        check = TensorCheck(stored.key, stored.dtype, stored.shape)
        digest = hashlib.sha256() if hashes else None
        others = [] if comparison is None else comparison.of(stored)
        try:
            stored.locate()
            for start, values in sweep.ranges(stored):
                _look(check, values)
                if digest is not None:
                    digest.update(_bytes_of(values))
                for other in others:
                    other.look(start, values)
        except CheckpointError as error:
            report.damage.append(_damage(stored, error))
            return
        for other in others:
            other.close()
        if digest is not None:
            check.sha256 = digest.hexdigest()
        report.tensors[stored.key] = check

    def check(record: SummedRecord) -> None:
        try:
            for size_bytes in record.parts():
                sweep.advance(size_bytes)
        except (ValueError, CheckpointError) as error:
            for key in record.keys or ("",):
                report.damage.append(Damage(str(error), key, (record.file.name,)))

    sweep.run(
        [
            *(partial(examine, stored) for stored in in_order(contents.tensors.values())),
            *(partial(check, record) for record in records),
        ]
    )


def _damage(stored: StoredTensor, error: CheckpointError) -> Damage:
    return Damage(str(error), stored.key, tuple(dict.fromkeys(chunk.file.name for chunk in stored.chunks)))


def _look(check: TensorCheck, values: Tensor) -> None:
    """Count the elements that are not finite."""
    if values.is_complex():
        values = torch.view_as_real(values)
    if not values.is_floating_point() or values.dtype == torch.float4_e2m1fn_x2:
        return
    if values.dtype.itemsize == 1:
        for part in values.split(1 << 20):
            _count(check, part.float())
    else:
        _count(check, values)


def _count(check: TensorCheck, values: Tensor) -> None:
    # One pass over the memory if all elements are finite.
    if all(math.isfinite(end) for end in torch.stack(torch.aminmax(values)).tolist()):
        return
    check.num_nan += int(values.isnan().sum())
    check.num_inf += int(values.isinf().sum())


def _bytes_of(values: Tensor) -> Any:
    """Return the memory of a contiguous tensor as an object with a buffer. Without NumPy, a tensor has no buffer."""
    return (ctypes.c_char * (values.numel() * values.element_size())).from_address(values.data_ptr())


def _digest(report: VerifyReport) -> str:
    """Return one hash for all tensors: the hash of the sorted lines, one for each name."""
    whole = hashlib.sha256()
    for name in sorted(report.names):
        check = report.tensors[report.names[name]]
        shape = ",".join(map(str, check.shape))
        whole.update(f"{name} {str(check.dtype).removeprefix('torch.')} [{shape}] {check.sha256}\n".encode())
    return whole.hexdigest()


def _overlaps(contents: Contents) -> list[Damage]:
    """Return an item for tensors that share a part of their bytes, in formats where this is always a mistake."""
    if contents.format == "torch":
        return []  # Tensors of a torch file may be views of one storage.
    places: dict[int, list[tuple[int, int, StoredTensor]]] = {}
    for stored in contents.tensors.values():
        try:
            stored.locate()
        except CheckpointError:
            continue  # `_examine` reports it.
        for chunk in stored.chunks:
            if (extent := chunk.extent_bytes(stored.dtype)) > 0:
                places.setdefault(chunk.file.number, []).append((chunk.offset, chunk.offset + extent, stored))
    found = []
    for ranges in places.values():
        ranges.sort(key=lambda item: item[:2])
        _, end, last = ranges[0]
        for begin, stop, stored in ranges[1:]:
            if begin < end:
                name = next(chunk.file.name for chunk in stored.chunks)
                found.append(
                    Damage(f"{last.key} and {stored.key} overlap in {name} at byte {begin}.", stored.key, (name,))
                )
            if stop > end:
                end, last = stop, stored
    return found
