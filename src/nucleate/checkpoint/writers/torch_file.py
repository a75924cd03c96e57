"""The writer of torch files: one file, as `torch.save` writes it, but each rank writes its own boxes.

`torch.save` writes the shell: the nested state with space for every tensor. Then each rank writes its own boxes into
that space, as in every other format. So no rank needs more than a few MiB of additional memory.
"""

from __future__ import annotations

import copy
import math
import mmap
import os
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from nucleate.checkpoint.saving.snapshot import Snapshot
from nucleate.checkpoint.state.tree import KeyPath, join
from nucleate.checkpoint.writers import allocation, slabs
from nucleate.checkpoint.writers.base import Writer
from nucleate.checkpoint.writers.slabs import Place
from nucleate.cluster.save_group import SaveGroup
from nucleate.errors import CheckpointError

#: The entry of the state that holds the facts that tensors do not tell.
FIELD = "nucleate"
VERSION = 1
# Python has the name since 3.13.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


@final
class TorchFileWriter(Writer):
    """A writer of files that `torch.load(weights_only=True)` reads."""

    name = "torch"
    suffixes: ClassVar[tuple[str, ...]] = (".pt", ".pth", ".bin", ".ckpt")
    writes_folders: ClassVar[bool] = False

    def check(self, snapshot: Snapshot) -> None:
        if not snapshot.is_bare and FIELD in snapshot.skeleton:
            raise CheckpointError(
                f"the state has an entry called {FIELD}, but nucleate reserves that name in torch files. "
                "Rename the entry, or save to a folder."
            )

    def write(self, snapshot: Snapshot, draft: Path, group: SaveGroup) -> None:
        what = f"writing {draft}"
        places: dict[str, Place] = {}
        with group.all_or_none(what):
            if group.rank == 0:
                places = _create(snapshot, draft)
        slabs.write_tensors(snapshot.tensors, group.broadcast(places), draft, group, what, snapshot.moved)
        with group.all_or_none(what):
            if group.rank == 0:
                try:
                    _seal(draft)
                except OSError as error:
                    raise allocation.failure(draft, error) from error


def _create(snapshot: Snapshot, draft: Path) -> dict[str, Place]:
    """Write a file with everything but the tensors' bytes, and return the tensors' places in the file."""
    empty = _without_memory({held.key: (held.shape, held.dtype) for held in snapshot.tensors})

    def tensor_at(place: KeyPath) -> Tensor | None:
        key = snapshot.keys.get(place)
        return None if key is None else empty[key]

    state = join(snapshot.skeleton, (), tensor_at)
    for path in snapshot.modules:
        state = _with_versions(state, path, snapshot.versions.get(path))
    if not snapshot.is_bare and snapshot.is_complete:
        state[FIELD] = {"version": VERSION, "sharded": snapshot.sharded, "modules": snapshot.modules}
    try:
        with torch.serialization.skip_data(), open(draft, "xb") as file:
            torch.save(state, file)
            allocation.reserve(file.fileno(), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise allocation.failure(draft, error, snapshot.size_bytes) from error
    shell = torch.load(draft, map_location="meta", weights_only=True, mmap=False)
    places: dict[str, Place] = {}
    for path, key in snapshot.keys.items():
        tensor: Any = shell
        for part in path:
            tensor = tensor[part]
        places[key] = Place("", tensor.untyped_storage()._checkpoint_offset, tensor.dtype, tuple(tensor.shape))
    return places


def _without_memory(looks: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    """Return CPU tensors that take no memory, each with its own storage. Nothing may read their elements.

    Tensors of one dtype share pages that nothing touches. Torch's FakeTensor would work as well, but it imports torch's
    compiler, which takes a second.

    Args:
        looks: The shape and dtype of each tensor, by key.
    """
    longest: dict[torch.dtype, int] = {}
    for shape, dtype in looks.values():
        longest[dtype] = max(longest.get(dtype, 1), math.prod(shape))
    pages = {dtype: _untouched(length * dtype.itemsize) for dtype, length in longest.items()}
    return {
        key: torch.frombuffer(pages[dtype], dtype=dtype, count=math.prod(shape)).view(shape)
        if math.prod(shape)
        else torch.empty(shape, dtype=dtype)
        for key, (shape, dtype) in looks.items()
    }


def _untouched(size_bytes: int) -> mmap.mmap | bytearray:
    """Return memory that the system provides only when it is touched. On Linux it may exceed the machine's memory."""
    if sys.platform != "linux":
        return bytearray(size_bytes)
    return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)


def _with_versions(state: Any, path: KeyPath, versions: Any) -> Any:
    """Return the state, with the module's entry as `state_dict` returns it: an ordered dict with versions."""
    if path:
        state[path[0]] = _with_versions(state[path[0]], path[1:], versions)
        return state
    ordered = OrderedDict(state)
    if versions is not None:
        ordered._metadata = copy.copy(versions)  # type: ignore[attr-defined]
    return ordered


def _seal(path: Path) -> None:
    """Write the check sums. `torch.load` does not check them, but every other reader of zip archives does."""
    with open(path, "r+b") as file:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            directory = archive.start_dir
        sums: dict[str, int] = {}
        for record in records:
            file.seek(record.header_offset + 26)
            name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
            begin = record.header_offset + 30 + name_bytes + extra_bytes
            sums[record.filename] = _check_sum(file.fileno(), begin, record.file_size)
            if sums[record.filename] != record.CRC:
                os.pwrite(file.fileno(), struct.pack("<L", sums[record.filename]), record.header_offset + 14)
                if record.flag_bits & 8:
                    # The archive repeats the check sum behind the data.
                    os.pwrite(file.fileno(), struct.pack("<L", sums[record.filename]), begin + record.file_size + 4)
        place = directory
        for record in records:
            file.seek(place + 28)
            lengths = struct.unpack("<HHH", file.read(6))
            os.pwrite(file.fileno(), struct.pack("<L", sums[record.filename]), place + 16)
            place += 46 + sum(lengths)
        os.fsync(file.fileno())


def _check_sum(descriptor: int, begin: int, size_bytes: int) -> int:
    value = 0
    for offset in range(begin, begin + size_bytes, slabs.STAGING_BYTES):
        wanted = min(slabs.STAGING_BYTES, begin + size_bytes - offset)
        value = zlib.crc32(os.pread(descriptor, wanted, offset), value)
    return value
