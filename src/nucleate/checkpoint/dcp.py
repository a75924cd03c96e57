"""Tensors to and from a folder in the format of torch.distributed.checkpoint (DCP).

This file is the only one that knows DCP: it writes, reads the headers without running code from the file, and
reads tensors into place. It is imported where it is used, since DCP takes a while to import. Which tensors, and
whether the folder is whole, is for its callers.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from nucleate.checkpoint.folder import METADATA
from nucleate.errors import CheckpointError, name_list

# What a `.metadata` file is made of (torch/distributed/checkpoint/{metadata,filesystem}.py, 2.13). It is a
# pickle, and an unrestricted one would run whatever the file says.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which has no place in a checkpoint's index")


class _Writer(FileSystemWriter):
    """DCP's writer, which does not put the path of this machine into the file."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)


class _Reader(FileSystemReader):
    """DCP's reader, given headers that were read and checked before."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def is_sharded(tensor: Tensor) -> bool:
    """Return whether `tensor` is spread over ranks."""
    return isinstance(tensor, DTensor)


def is_unreduced(tensor: Tensor) -> bool:
    """Return whether the ranks hold summands of `tensor` instead of parts or copies of it."""
    return isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements)


def local_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of this rank's part of `tensor`."""
    return tensor.to_local().shape if isinstance(tensor, DTensor) else tensor.shape


def sharded_dims(tensor: Tensor) -> list[int] | None:
    """Return which dims of `tensor` are spread over ranks; None where it is a plain tensor."""
    if not isinstance(tensor, DTensor):
        return None
    return sorted({placement.dim for placement in tensor.placements if isinstance(placement, (Shard, _StridedShard))})


def zeros_beside(parameter: Tensor, shape: torch.Size, dtype: torch.dtype, dims: list[int]) -> Tensor:
    """Return zeros on the mesh of a sharded parameter, sharded as it is where both are sharded in that dim.

    Args:
        parameter: A sharded tensor.
        shape: The whole shape of the result, such as that of one statistic for each row of the parameter.
        dtype: The dtype of the result.
        dims: The dims in which the result may be sharded.
    """
    assert isinstance(parameter, DTensor)
    whole = torch.zeros(shape, dtype=dtype, device=parameter.to_local().device)
    everywhere = [Replicate()] * parameter.device_mesh.ndim
    wanted = [
        placement if isinstance(placement, (Shard, _StridedShard)) and placement.dim in dims else Replicate()
        for placement in parameter.placements
    ]
    return DTensor.from_local(whole, parameter.device_mesh, everywhere, run_check=False).redistribute(placements=wanted)


def write(tensors: Mapping[str, Tensor], folder: Path, rank: int, world_size: int) -> None:
    """Write `tensors` into an empty folder, and to disk, on all ranks together.

    A sharded tensor is written by the ranks that hold it. Of a plain one rank 0's copy counts, the others' are
    ignored: where replicas differ, such as the running statistics of a batch norm, a checkpoint holds one model.

    Args:
        tensors: Key to tensor.
        folder: An empty folder on a file system that every rank shares.
        rank: This process among all.
        world_size: How many processes there are.

    Raises:
        CheckpointError: Writing failed on some rank; raised on all of them.
    """
    mine = {key: tensor for key, tensor in tensors.items() if rank == 0 or is_sharded(tensor)}
    with _translated(f"writing a checkpoint to {folder}"):
        dcp_save(
            mine,
            storage_writer=_Writer(folder, sync_files=True),
            planner=DefaultSavePlanner(flatten_state_dict=False),
            no_dist=world_size == 1,
        )


def read(targets: Mapping[str, Tensor], folder: Path, metadata: Metadata, distributed: bool) -> None:
    """Fill `targets` from the folder; a sharded one reads only what this rank holds.

    Args:
        targets: Key to the tensor to fill, of the saved shape; another dtype is cast to.
        folder: Where the checkpoint is.
        metadata: Its headers, from `headers`.
        distributed: Whether all ranks read together, with the same keys, and fail together.

    Raises:
        CheckpointError: Reading failed; if distributed, on any rank.
    """
    with _translated(f"reading the checkpoint at {folder}"), torch.no_grad():
        dcp_load(
            dict(targets),
            storage_reader=_Reader(folder, metadata),
            planner=DefaultLoadPlanner(flatten_state_dict=False),
            no_dist=not distributed,
        )


def headers(folder: Path) -> Metadata:
    """Read what tensors a folder holds, and check that the files they are in are there and long enough.

    Raises:
        CheckpointError: The headers are damaged, or files are missing or cut short.
    """
    try:
        metadata = _Unpickler(io.BytesIO((folder / METADATA).read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        others = [
            key for key, item in metadata.state_dict_metadata.items() if not isinstance(item, TensorStorageMetadata)
        ]
        ends: dict[str, int] = {}
        for item in metadata.storage_data.values():
            ends[item.relative_path] = max(ends.get(item.relative_path, 0), item.offset + item.length)
    except Exception as error:
        # A damaged pickle can raise nearly anything.
        raise CheckpointError(
            f"the index {folder / METADATA} cannot be read: {type(error).__name__}: {error}"
        ) from error
    if others:
        raise CheckpointError(
            f"the checkpoint at {folder} holds pickled objects, which are not read: {name_list(others)}."
        )
    damaged = [problem for name, end in sorted(ends.items()) if (problem := _damage(folder, name, end))]
    if damaged:
        raise CheckpointError(
            f"the checkpoint at {folder} is damaged: {name_list(damaged)}. If it was copied, copy it again; if several "
            "nodes wrote it, they must share the file system."
        )
    return metadata


def _damage(folder: Path, name: str, end: int) -> str | None:
    """Return what is wrong with the file `name`, which must reach to byte `end`."""
    if os.path.basename(name) != name or name in ("", ".", ".."):
        return f"{name!r} points outside the folder"
    try:
        size_bytes = (folder / name).stat().st_size
    except OSError:
        return f"{name} is missing"
    return None if size_bytes >= end else f"{name} has {size_bytes} of {end} bytes"


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Raise DCP's errors as ours, and keep it from warning about what is meant."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="torch.distributed is (disabled|unavailable)", category=UserWarning
            )
            yield
    # A CheckpointException is a BaseException (torch/distributed/checkpoint/api.py, 2.13).
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, (KeyboardInterrupt, SystemExit)):
                raise failure from error
        failed = [f"rank {rank}: {type(failure).__name__}: {failure}" for rank, (failure, _) in error.failures.items()]
        raise CheckpointError(f"{what} failed. {name_list(failed)}") from error
