"""The index of a torch.distributed.checkpoint folder, its `.metadata`, read as data.

The index is a pickle. Its objects (torch/distributed/checkpoint/{metadata,filesystem}.py, 2.13) become plain records
here. This module calls nothing that the pickle names.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from nucleate.checkpoint.readers.torch.pickled import Maker, Unpickler
from nucleate.checkpoint.readers.torch.torch_pickle import find
from nucleate.checkpoint.stored.data_file import DataFile
from nucleate.errors import CheckpointError

_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    )
} | {("torch.distributed.checkpoint.filesystem", "_StorageInfo")}

# Fewer bytes than the index needs for each chunk, its place and its entry (torch 2.13).
_CHUNK_BYTES = 8
# More than any number, and any number of dims, in an index that torch writes.
_LIMIT = 1 << 60
_MOST_DIMS = 64

# The unpickler has checked the numbers of a `torch.Size` (`tensor_notes.sizes`). These two names save a third of the
# time of a large index: it has millions of numbers, and calls take most of the time.
_Size = torch.Size
_new = tuple.__new__


class _Record:
    """A pickled object of one of the classes above, with the name of its class."""

    __slots__ = ("name", "state")

    def __init__(self, name: str, *_: Any) -> None:
        self.name = name
        self.state: Any = {}

    def build(self, state: Any) -> None:
        self.state = state


class Blob(NamedTuple):
    """The place of one chunk of a tensor, or of one value.

    Attributes:
        file: The name of the file in the folder.
        offset: The place in the file where the chunk or value begins.
        size_bytes: The length of the chunk or value in the file.
    """

    file: str
    offset: int
    size_bytes: int


class DCPChunk(NamedTuple):
    """A chunk of a tensor.

    Attributes:
        begin: Its first index in the tensor, for each dim.
        shape: Its size in each dim.
        blob: Its place.
    """

    begin: tuple[int, ...]
    shape: tuple[int, ...]
    blob: Blob


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor as the index describes it.

    Attributes:
        dtype: The dtype of its elements.
        shape: The shape of the whole tensor.
        parts: Its chunks.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: list[DCPChunk]


@dataclass(frozen=True)
class DCPMetadata:
    """The index of a folder.

    Attributes:
        tensors: The tensors by key.
        values: The place of each value that is not a tensor, by key.
        paths: The place of each key in the saved state, as far as the index contains it.
    """

    tensors: dict[str, Described]
    values: dict[str, Blob]
    paths: dict[str, tuple[Any, ...]]

    @classmethod
    def read(cls, file: DataFile) -> DCPMetadata:
        """Read an index.

        Raises:
            CheckpointError: The index is damaged.
        """
        root = Unpickler(file.read(0, file.size_bytes), _find, name=file.name).load()
        try:
            # Many tensors of a damaged file may share one long list of chunks.
            return cls._of(root, most_chunks=1000 + file.size_bytes // _CHUNK_BYTES)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            detail = str(error) if type(error) is ValueError else repr(error)
            raise CheckpointError(f"{file.name} is damaged: {detail[:500]}. Copy it again.") from error

    @classmethod
    def _of(cls, root: Any, most_chunks: int) -> DCPMetadata:
        if not isinstance(root, _Record) or root.name != "Metadata":
            raise ValueError("it holds no metadata")
        blobs = _blobs(root.state["storage_data"])
        tensors: dict[str, Described] = {}
        values: dict[str, Blob] = {}
        for key, entry in _items(root.state["state_dict_metadata"]):
            _text(key)
            if entry.name == "BytesStorageMetadata":
                if None not in (places := blobs.get(key, {})):
                    raise ValueError(f"nothing says where {key} lies")
                values[key] = places[None]
            else:
                most_chunks -= len(entry.state["chunks"])
                if most_chunks < 0:
                    raise ValueError("it names more chunks of tensors than it has room for")
                tensors[key] = _described(key, entry, blobs.get(key, {}))
        paths = root.state.get("planner_data")
        return cls(tensors, values, dict(_paths(paths)) if isinstance(paths, dict) else {})


def _blobs(storage_data: Any) -> dict[str, dict[tuple[int, ...] | None, Blob]]:
    """Return the place of each chunk by the tensor's key and the chunk's first index, and of each value under None."""
    blobs: dict[str, dict[tuple[int, ...] | None, Blob]] = {}
    for index, info in _items(storage_data):
        where, stored = index.state, info.state
        key, name, offset, length = where["fqn"], stored["relative_path"], stored["offset"], stored["length"]
        if type(key) is not str or type(name) is not str:
            raise _unnamed()
        begin = where.get("offset")
        if begin is not None:
            begin = tuple(begin) if type(begin) is _Size else _sizes(begin)
        places = blobs.get(key)
        if places is None:
            places = blobs[key] = {}
        elif begin in places:
            raise ValueError(f"it holds {key} twice")
        if stored.get("transform_descriptors"):
            raise ValueError(f"{key} was transformed by {reprlib.repr(stored['transform_descriptors'])[:100]}")
        if not (type(offset) is type(length) is int and 0 <= offset < _LIMIT and 0 <= length < _LIMIT):
            _sizes((offset, length))
        places[begin] = _new(Blob, (name, offset, length))
    return blobs


def _described(key: str, entry: _Record, places: dict[tuple[int, ...] | None, Blob]) -> Described:
    properties = entry.state["properties"].state
    dtype = properties[0] if isinstance(properties, tuple) else properties["dtype"]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key} has no dtype")
    parts = []
    for chunk in entry.state["chunks"]:
        state = chunk.state
        begin, shape = state["offsets"], state["sizes"]
        begin = tuple(begin) if type(begin) is _Size else _sizes(begin)
        blob = places.get(begin)
        if blob is None:
            raise ValueError(f"nothing says where the part of {key} that begins at {begin} lies")
        shape = tuple(shape) if type(shape) is _Size else _sizes(shape)
        parts.append(_new(DCPChunk, (begin, shape, blob)))
    return Described(dtype, _sizes(entry.state["size"]), parts)


def _find(module: str, name: str) -> Any:
    if (module, name) in _CLASSES:
        return Maker(partial(_Record, name))
    return find(module, name)


def _items(mapping: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(mapping, dict):
        raise ValueError("it lacks a part")
    yield from mapping.items()


def _paths(paths: dict[Any, Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for key, path in paths.items():
        if type(key) is not str or type(path) is not tuple or not 0 < len(path) < 100:
            continue
        if all(type(part) in (str, int) for part in path):
            yield key, path


def _text(value: Any) -> str:
    if type(value) is not str:
        raise _unnamed()
    return value


def _unnamed() -> ValueError:
    return ValueError("a name in it is not a string")


def _sizes(numbers: Any) -> tuple[int, ...]:
    sizes = tuple(numbers)
    if not all(type(number) is int and 0 <= number < _LIMIT for number in sizes) or len(sizes) > _MOST_DIMS:
        raise ValueError(f"a shape, an offset or a length in it is {reprlib.repr(sizes)[:100]}")
    return sizes
