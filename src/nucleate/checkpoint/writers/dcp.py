"""The writer of DCP folders, the format of torch.distributed.checkpoint: a file for each rank, and an index.

Only this file knows DCP's writing side. It is imported only when it is used, because importing DCP takes a while.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

from nucleate.checkpoint.disk.folder import write_marker
from nucleate.checkpoint.readers.dcp.dcp import DCPReader
from nucleate.checkpoint.saving.moved import as_boxes
from nucleate.checkpoint.saving.rank_share import Box, SavedTensor
from nucleate.checkpoint.saving.snapshot import Snapshot
from nucleate.checkpoint.state.values import VALUES
from nucleate.checkpoint.writers import allocation
from nucleate.checkpoint.writers.base import Writer
from nucleate.cluster.save_group import SaveGroup
from nucleate.deferred.elements import fill_from
from nucleate.errors import CheckpointError, name_list
from nucleate.report.meter import Meter

# The bytes that DCP copies from an accelerator in advance: DCP's default.
_COPY_AHEAD_BYTES = 10_000_000


@final
class DcpWriter(Writer):
    """A writer of DCP folders. One additional tensor holds the values."""

    name = "dcp"

    def write(self, snapshot: Snapshot, draft: Path, group: SaveGroup) -> None:
        what = f"writing a checkpoint to {draft}"
        with group.all_or_none(what):
            # DCP would make the folder on every node, and rank 0 would miss files when all has been written.
            allocation.check_seen(draft)
            tensors = as_boxes(snapshot.tensors, snapshot.moved, snapshot.whole)
            if snapshot.values is not None:
                values = snapshot.values
                tensors.append(SavedTensor(VALUES, values.dtype, tuple(values.shape), None, (Box((0,), values),)))
            if group.rank == 0:
                # DCP's own message for a full disk is "unexpected pos".
                allocation.check_room(draft, snapshot.size_bytes)
        reads = any(box.given is not None for held in tensors for box in held.boxes)
        meter = Meter(sum(held.held_bytes for held in tensors), "writing")
        files = _Files()
        with _translated(what, draft, files), group.noticing(), meter:
            # DCP's `save` would only add a warning in a single process (2.13), and a thread that runs beside training
            # must not filter warnings.
            _save_state_dict(
                {},
                # No element source may be read in advance; see `_Planner.resolve_data`.
                _Storage(draft, files, copy_ahead_bytes=0 if reads else _COPY_AHEAD_BYTES),
                process_group=group.process_group,
                no_dist=group.world_size == 1,
                planner=_Planner(tensors, meter),
            )
        with group.all_or_none(what):
            if group.rank == 0:
                # Rank 0 must see the files of the other ranks.
                DCPReader().read(draft)
                write_marker(draft, self.name, group.world_size)


class _Files(FileSystem):
    """A file system that remembers an interrupt of a write, which torch's serialization turns into a RuntimeError."""

    def __init__(self) -> None:
        super().__init__()
        self.interrupt: BaseException | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            yield _Watched(stream, self) if "w" in mode else stream  # type: ignore[misc]


class _Watched:
    """A stream that reports a KeyboardInterrupt or SystemExit to its file system."""

    def __init__(self, stream: Any, files: _Files) -> None:
        self._stream = stream
        self._files = files

    def write(self, data: Any) -> Any:
        try:
            return self._stream.write(data)
        except (KeyboardInterrupt, SystemExit) as interrupt:
            self._files.interrupt = interrupt
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Storage(FileSystemWriter):
    """DCP's storage, but without the path on this machine, which DCP would write into the file."""

    def __init__(self, folder: Path, files: _Files, copy_ahead_bytes: int) -> None:
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=copy_ahead_bytes)
        self.fs = files

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)


class _Planner(DefaultSavePlanner):
    """A planner that writes this rank's boxes. The snapshot has already decided which rank writes which box."""

    def __init__(self, tensors: list[SavedTensor], meter: Meter) -> None:
        super().__init__(flatten_state_dict=False)
        self._meter = meter
        self._tensors = tensors
        self._boxes: dict[tuple[str, tuple[int, ...]], Box] = {}
        given = [box.values for held in tensors for box in held.boxes if box.given is not None]
        largest = max((values.numel() * values.element_size() for values in given), default=0)
        self._buffer: Any = torch.UntypedStorage(largest)

    def create_local_plan(self) -> SavePlan:
        self._boxes = {(held.key, box.begin): box for held in self._tensors for box in held.boxes}
        self.plan = SavePlan([_item(held, box) for held in self._tensors for box in held.boxes])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        offset = write_item.index.offset
        assert offset is not None
        # DCP calls this when the box is about to be written.
        box = self._boxes[write_item.index.fqn, tuple(offset)]
        if box.given is None:
            values = box.values.resolve_conj().resolve_neg()
            if (
                values.device.type not in ("cpu", "meta")
                and values.device.index != torch.accelerator.current_device_index()
            ):
                # DCP waits only for the current device (`_OverlappingCpuLoader` in
                # torch/distributed/checkpoint/filesystem.py, 2.13).
                values = values.cpu()
        else:
            # All boxes use one buffer: the previous tensor is written by now, but DCP keeps it until the end
            # (`_write_files_from_queue` in torch/distributed/checkpoint/filesystem.py, 2.13).
            memory = self._buffer[: box.values.numel() * box.values.element_size()]
            values = torch.empty(0, dtype=box.values.dtype, device="cpu")
            values.set_(memory, 0, box.values.shape, box.values.stride())
            fill_from(values, box.given)
        self._meter.add(values.numel() * values.element_size())
        return values


def _item(held: SavedTensor, box: Box) -> WriteItem:
    begin = torch.Size(box.begin)
    return WriteItem(
        index=MetadataIndex(held.key, begin),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=begin, sizes=box.values.shape),
            properties=TensorProperties(dtype=held.dtype),
            size=torch.Size(held.shape),
        ),
    )


@contextmanager
def _translated(what: str, folder: Path, files: _Files) -> Iterator[None]:
    """Raise DCP's errors as nucleate's."""
    try:
        yield
    # A CheckpointException is a BaseException (torch/distributed/checkpoint/api.py, 2.13).
    except CheckpointException as error:
        if files.interrupt is not None:
            raise files.interrupt from error
        for failure, _ in error.failures.values():
            if isinstance(failure, (KeyboardInterrupt, SystemExit)):
                raise failure from error
        failed = [f"rank {rank}: {type(failure).__name__}: {failure}" for rank, (failure, _) in error.failures.items()]
        room = f" ({free} bytes are free there now)" if (free := allocation.free_bytes(folder)) is not None else ""
        raise CheckpointError(f"{what} failed{room}. {name_list(failed)}") from error
