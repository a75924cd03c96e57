"""The reader of torch.distributed.checkpoint (DCP) folders, both those of nucleate and all others."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, final

import torch

from nucleate.checkpoint.disk.folder import MARKER, METADATA
from nucleate.checkpoint.readers.base import Reader
from nucleate.checkpoint.readers.dcp.blobs import BlobFile
from nucleate.checkpoint.readers.dcp.dcp_metadata import DCPMetadata, Described
from nucleate.checkpoint.readers.dcp.late_chunk import LateChunk
from nucleate.checkpoint.readers.saved import VALUES, check_marker, contents_of
from nucleate.checkpoint.readers.torch.structure import Structure
from nucleate.checkpoint.state.tree import KeyPath
from nucleate.checkpoint.stored.chunk import Chunk
from nucleate.checkpoint.stored.contents import Contents
from nucleate.checkpoint.stored.open_folder import OpenFolder
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.errors import CheckpointError, CheckpointNotFoundError, name_list
from nucleate.garbage import uncollected

SUFFIX = ".distcp"

#: In folders of more chunks, the numbers of a chunk are found when somebody reads it.
MOST_EAGER_CHUNKS = 10_000


@final
class DCPReader(Reader):
    """The reader of folders that hold a `.metadata` and the files that it names."""

    name = "dcp"

    def claims(self, path: Path) -> bool:
        """Claim a folder that holds an index, or other files of a DCP checkpoint."""
        if not path.is_dir():
            return False
        names = {item.name for item in path.iterdir()}
        return bool(names & {METADATA, MARKER}) or any(name.endswith(SUFFIX) for name in names)

    def read(self, path: Path) -> Contents:
        """Read the index, and in a small folder the header of each chunk, which says where the numbers begin."""
        with OpenFolder(path) as folder, uncollected():
            return self._read(path, folder)

    def _read(self, path: Path, folder: OpenFolder) -> Contents:
        if not folder.has(METADATA):
            raise CheckpointError(
                f"the checkpoint at {path} has no {METADATA}, which is written last: the save did not end, or the "
                "folder was copied without hidden files. Copy the whole folder, or use an earlier checkpoint."
            )
        is_ours = check_marker(folder)
        metadata = DCPMetadata.read(folder.open(METADATA))
        files = _open(folder, metadata)
        for key, tensor in metadata.tensors.items():
            if not tensor.parts and 0 not in tensor.shape:
                raise CheckpointError(f"{path / METADATA} is damaged: it names no part of {key}. Copy it again.")
        is_late = sum(len(tensor.parts) for tensor in metadata.tensors.values()) > MOST_EAGER_CHUNKS
        tensors = {key: _stored(key, tensor, files, is_late) for key, tensor in metadata.tensors.items()}
        if not is_ours:
            return self._foreign(path, metadata, tensors, files)
        values = tensors.pop(VALUES, None)
        if values is None or values.dtype is not torch.uint8 or not values.is_plain:
            raise CheckpointError(f"the checkpoint at {path} is damaged: it has no {VALUES}. Copy it again.")
        chunk = values.chunks[0]
        return contents_of(path, self.name, tensors, chunk.file.read(chunk.offset, values.size_bytes))

    def _foreign(
        self, path: Path, metadata: DCPMetadata, tensors: dict[str, StoredTensor], files: dict[str, BlobFile]
    ) -> Contents:
        """Return the contents of a folder that `save` did not write."""
        structure = Structure()
        structure.tensors.update(tensors)
        values: dict[KeyPath, Any] = {}
        skipped: dict[str, str] = {}
        for key, blob in metadata.values.items():
            place = metadata.paths.get(key, (key,))
            try:
                values[place] = structure.skeleton(files[blob.file].archive(blob.offset, blob.size_bytes), place)
            except CheckpointError as error:
                # Objects such as data loaders leave pickled code there. The tensors can be read all the same.
                skipped[key] = str(error)
        keys = {metadata.paths.get(key, (key,)): key for key in tensors}
        if len(keys) != len(tensors):
            raise CheckpointError(f"{path / METADATA} is damaged: two tensors have the same place. Copy it again.")
        skeleton = _nested({**dict.fromkeys(keys), **values}, path)
        notes = {"not read": f"{name_list(skipped)}: {next(iter(skipped.values()))}"} if skipped else {}
        modules = ((),) if all(len(place) == 1 for place in keys) else ()
        return Contents(path, self.name, structure.tensors, skeleton, {**keys, **structure.keys}, modules, notes=notes)


def _stored(key: str, tensor: Described, files: dict[str, BlobFile], is_late: bool) -> StoredTensor:
    """Return a tensor whose chunks are checked.

    Args:
        key: The tensor's key.
        tensor: The tensor as the index describes it.
        files: The files of the folder.
        is_late: Find the numbers of a chunk when somebody reads it, and check now only the index and the files' sizes.

    Raises:
        CheckpointError: The tensor is damaged.
    """
    chunks: list[Chunk] = []
    for part in tensor.parts:
        name, offset, size_bytes = part.blob
        file = files[name]
        if is_late:
            chunks.append(LateChunk(key, tensor.dtype, part, file))
        else:
            begin, stride = file.place(key, tensor.dtype, part.shape, offset, size_bytes)
            chunks.append(Chunk(file.file, begin, part.begin, part.shape, stride))
    stored = StoredTensor(key, tensor.dtype, tensor.shape, tuple(chunks))
    stored.check()
    return stored


def _open(folder: OpenFolder, metadata: DCPMetadata) -> dict[str, BlobFile]:
    """Open all files that the index names.

    Raises:
        CheckpointError: A file is missing, or the index names files outside of its folder.
    """
    names = {part.blob.file for tensor in metadata.tensors.values() for part in tensor.parts}
    names |= {blob.file for blob in metadata.values.values()}
    if outside := sorted(name for name in names if Path(name).name != name or name in ("", ".", "..")):
        raise CheckpointError(
            f"{folder.path / METADATA} names files outside of its folder: {name_list(map(repr, outside))}. It is "
            "damaged or malicious."
        )
    files: dict[str, BlobFile] = {}
    missing: list[str] = []
    for name in sorted(names):
        try:
            files[name] = BlobFile(folder.open(name))
        except CheckpointNotFoundError:
            missing.append(name)
    if missing:
        raise CheckpointNotFoundError(
            f"the checkpoint at {folder.path} is damaged: {name_list(missing)} of {len(names)} files "
            f"{'is' if len(missing) == 1 else 'are'} missing. If it was copied, copy it again. If several nodes wrote "
            "it, they must share the file system."
        )
    return files


def _nested(items: dict[KeyPath, Any], path: Path) -> dict[str, Any]:
    """Return the values, nested by their places."""
    root: dict[Any, Any] = {}
    lists: list[tuple[dict[Any, Any], Any]] = []
    for place, value in items.items():
        node = root
        for part, following in pairwise(place):
            if part not in node:
                node[part] = _Node()
                if isinstance(following, int):
                    lists.append((node, part))
            node = node[part]
            if not isinstance(node, _Node):
                raise CheckpointError(f"{path / METADATA} is damaged: {part!r} is a value and also holds other values.")
        if place[-1] in node:
            raise CheckpointError(f"{path / METADATA} is damaged: it holds {place[-1]!r} twice.")
        node[place[-1]] = value
    # The innermost lists come first, so that a list in a list is a list already.
    for holder, part in reversed(lists):
        if holder[part].keys() == set(range(len(holder[part]))):
            holder[part] = [holder[part][place] for place in range(len(holder[part]))]
    return {name: _plain(item) for name, item in root.items()}


class _Node(dict[Any, Any]):
    """A dict that `_nested` made for its items, unlike a dict that was saved."""


def _plain(node: Any) -> Any:
    if type(node) in (_Node, dict):
        return {key: _plain(item) for key, item in node.items()}
    if type(node) is list:
        return [_plain(item) for item in node]
    return node
