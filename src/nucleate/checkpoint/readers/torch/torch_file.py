"""The reader of torch files: a file of `torch.save`, or a folder with shards and an index."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, final

from nucleate.checkpoint.disk.folder import check_version
from nucleate.checkpoint.readers.base import Reader
from nucleate.checkpoint.readers.file_kinds import kind_of_archive
from nucleate.checkpoint.readers.shard_index import ShardIndex, indexes_among
from nucleate.checkpoint.readers.torch.structure import Structure
from nucleate.checkpoint.readers.torch.torch_archive import is_legacy, open_archive
from nucleate.checkpoint.readers.torch.zip_directory import ZipDirectory
from nucleate.checkpoint.state.tree import KeyPath, key_of
from nucleate.checkpoint.stored.contents import Contents
from nucleate.checkpoint.stored.data_file import DataFile, first_bytes
from nucleate.checkpoint.stored.open_folder import OpenFolder
from nucleate.checkpoint.stored.stored_object import StoredObject
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.errors import CheckpointError, CheckpointUnreadableError, name_list

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
INDEX_SUFFIX = ".bin.index.json"
#: The entry that `save` adds to the state.
ENTRY = "nucleate"
#: The name of the only tensor in a file that does not name it.
UNNAMED = "tensor"


@final
class TorchReader(Reader):
    """The reader of `.pt`, `.pth`, `.bin` and `.ckpt` files, and of folders of them with an index.

    Args:
        trusts: Whether to let torch restore the objects that are not plain data, which runs code that the file chooses.
    """

    name = "torch"

    def __init__(self, trusts: bool = False) -> None:
        self._trusts = trusts

    def trusting(self) -> TorchReader:
        """Return a reader that restores all objects as `torch.load(weights_only=False)` does."""
        return TorchReader(trusts=True)

    def claims(self, path: Path) -> bool:
        """Claim a file with one of these suffixes, a folder of such files, and other files that torch wrote."""
        if path.is_dir():
            return bool(indexes_among(os.listdir(path), INDEX_SUFFIX) or _files(path))
        return path.name.endswith((*SUFFIXES, INDEX_SUFFIX)) or _is_of_torch(path)

    def read(self, path: Path) -> Contents:
        """Read, as data, the pickles of all files that belong to the checkpoint."""
        if path.name.endswith(INDEX_SUFFIX):
            with OpenFolder(path.parent) as folder:
                return self._read_shards(folder, path.name)
        if not path.is_dir():
            return self._read_file(path)
        with OpenFolder(path) as folder:
            indexes = indexes_among(folder.names(), INDEX_SUFFIX)
            files = _files(path)
            if len(indexes) > 1 or (not indexes and len(files) != 1):
                found = indexes or [file.name for file in files]
                raise CheckpointError(
                    f"{path} holds {len(found)} checkpoints, {name_list(found)}. Give the path of the one to read."
                )
            if indexes:
                return self._read_shards(folder, indexes[0])
            return self._read_file(files[0], folder.open(files[0].name))

    def _read_file(self, path: Path, file: DataFile | None = None) -> Contents:
        structure = Structure(self._trusts, strict=False)
        skeleton = structure.skeleton(open_archive(DataFile(path) if file is None else file))
        if skeleton is None and structure.tensors:
            return self._unnamed(path, structure)
        if isinstance(skeleton, StoredObject):
            # Nothing in the file can be passed over. So the message is that of the object, if it cannot be made.
            skeleton = skeleton.make()
        if not isinstance(skeleton, dict):
            raise CheckpointUnreadableError(
                f"{path} holds a {type(skeleton).__name__}. A checkpoint must be a dict, such as `model.state_dict()`, "
                'so that each item has a name. Save `{"name": value}` instead.'
            )
        if isinstance(own := skeleton.get(ENTRY), dict) and "version" in own:
            return self._complete(path, structure, {k: v for k, v in skeleton.items() if k != ENTRY}, own)
        modules = structure.modules
        if not modules and any(len(place) == 1 for place in structure.keys):
            modules = [()]
        return Contents(
            path,
            self.name,
            structure.tensors,
            skeleton,
            structure.keys,
            tuple(modules),
            versions=structure.versions,
            objects=structure.objects,
        )

    def _unnamed(self, path: Path, structure: Structure) -> Contents:
        """Return the contents of a file that holds one tensor without a name."""
        (tensor,) = structure.tensors.values()
        tensors = {UNNAMED: dataclasses.replace(tensor, key=UNNAMED)}
        return Contents(path, self.name, tensors, {UNNAMED: None}, {(UNNAMED,): UNNAMED}, ((),), is_unnamed=True)

    def _complete(self, path: Path, structure: Structure, skeleton: dict[str, Any], own: dict[str, Any]) -> Contents:
        """Return the contents of a file that `save` wrote."""
        check_version(own["version"], path)
        try:
            sharded = {key: [int(dim) for dim in dims] for key, dims in own["sharded"].items()}
            modules = tuple(tuple(place) for place in own["modules"])
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"`{ENTRY}` in {path} is damaged: {type(error).__name__}: {error}. Copy the file again."
            ) from error
        # Tied tensors share their bytes, and have the name of the first one as their key, as in every other format.
        first: dict[Any, str] = {}
        keys: dict[KeyPath, str] = {}
        for place, key in structure.keys.items():
            tensor = structure.tensors[key]
            keys[place] = first.setdefault((tensor.dtype, tensor.shape, tensor.chunks), key) if tensor.numel else key
        tensors = {key: structure.tensors[key] for key in dict.fromkeys(keys.values())}
        objects = structure.objects
        return Contents(path, self.name, tensors, skeleton, keys, modules, sharded, is_complete=True, objects=objects)

    def _read_shards(self, folder: OpenFolder, index_name: str) -> Contents:
        index = ShardIndex.read(folder, index_name)
        shards = {name: self._read_file(folder.path / name, index.open(name)) for name in index.names}
        for shard in shards.values():
            shard.check_named()
        index.compare({name: shard.tensors for name, shard in shards.items()})
        tensors: dict[str, StoredTensor] = {key: shards[name].tensors[key] for key, name in index.weight_map.items()}
        stale = sorted(file.name for file in _files(folder.path) if file.name not in shards)
        notes = {"ignored files": f"{name_list(stale)}: {index_name} does not name them"} if stale else {}
        if objects := [key_of(place) for shard in shards.values() for place in shard.objects]:
            notes["not read"] = name_list(objects)
        return Contents.flat(folder.path, self.name, tensors, notes)


def _files(folder: Path) -> list[Path]:
    """Return the torch files in a folder, or only the model's file if it has its usual name."""
    found = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES) and not path.is_dir())
    return [path for path in found if path.name == "pytorch_model.bin"] or found


def _is_of_torch(path: Path) -> bool:
    """Return whether torch wrote a file without a torch suffix. If it is not a checkpoint, `read` names its kind."""
    start = first_bytes(path, 256)
    if is_legacy(start):
        return True
    if not start.startswith(b"PK\x03\x04"):
        return False
    try:
        file = DataFile(path)
        names = ZipDirectory(file.read, file.size_bytes, file.name).names()
    except CheckpointError:
        # The first record is the pickle, but the end of the archive is damaged.
        return start[30 : 30 + int.from_bytes(start[26:28], "little")].endswith(b"/data.pkl")
    kind = kind_of_archive(names)
    return kind is None or kind.is_of_torch
