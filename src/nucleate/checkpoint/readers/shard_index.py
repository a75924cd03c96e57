"""The index of a folder with shards, as Hugging Face writes it: a map from each tensor's key to the tensor's file."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nucleate.checkpoint.readers.strict_json import cut, parse
from nucleate.checkpoint.stored.data_file import DataFile
from nucleate.checkpoint.stored.open_folder import OpenFolder
from nucleate.errors import CheckpointError, CheckpointKeyError, CheckpointNotFoundError, name_list

# A few times the size of the index of the largest models.
_MAX_INDEX_BYTES = 1 << 30


@dataclass(frozen=True)
class ShardIndex:
    """The index of a folder, which says which file holds which tensor.

    Attributes:
        folder: The folder of the index and the files.
        path: The path of the index.
        weight_map: A map from the key of each tensor to the name of its file.
    """

    folder: OpenFolder
    path: Path
    weight_map: dict[str, str]

    @classmethod
    def read(cls, folder: OpenFolder, name: str) -> ShardIndex:
        """Read and check an index.

        Args:
            folder: The folder of the index.
            name: The name of the index.

        Raises:
            CheckpointError: The index is damaged, or names a file outside of its folder.
        """
        file = folder.open(name)
        path = file.path
        if file.size_bytes > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{path} has {file.size_bytes} bytes, too many for an index.")
        try:
            index = parse(file.read(0, file.size_bytes))
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: it is not valid JSON ({error}).") from error
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{path} is damaged: it has no `weight_map` from keys to file names.")
        for key, name in weight_map.items():
            if not isinstance(name, str):
                raise CheckpointError(f"{path} gives no file name for {key!r}, but {cut(name)}.")
            if os.path.basename(name) != name or name in ("", ".", "..") or "\\" in name:
                raise CheckpointError(
                    f"{path} says that {key!r} is in {cut(name)}, which is not the name of a file beside it. An "
                    "index may only name files in its own folder."
                )
        return cls(folder, path, weight_map)

    @cached_property
    def names(self) -> list[str]:
        """The names of the files, sorted, each once."""
        return sorted(set(self.weight_map.values()))

    def open(self, name: str) -> DataFile:
        """Open a file that the index names.

        Raises:
            CheckpointNotFoundError: The file is missing.
            CheckpointError: The file cannot be read.
        """
        try:
            return self.folder.open(name)
        except CheckpointNotFoundError as error:
            missing = [other for other in self.names if not self.folder.has(other)]
            key = next(key for key, other in self.weight_map.items() if other == name)
            raise CheckpointNotFoundError(
                f"{self.path} names {len(self.names)} files, but {len(missing)} are missing: "
                f"{name_list(missing)} ({key} is in {name}). Copy them too."
            ) from error

    def compare(self, held: Mapping[str, Collection[str]]) -> None:
        """Make sure that each file holds exactly the tensors that the index places there.

        Args:
            held: The keys in each file, by the file's name.

        Raises:
            CheckpointKeyError: A tensor is not in its file, a tensor is in two files, or the index omits a tensor.
        """
        places: dict[str, list[str]] = {}
        for name, keys in held.items():
            for key in keys:
                places.setdefault(key, []).append(name)
        for key, name in self.weight_map.items():
            if key not in held[name]:
                where = f"it is in {name_list(places[key])}" if key in places else "none of its files holds it"
                raise CheckpointKeyError(
                    f"{self.path} says that {key} is in {name}, but {where}. The index and the files do not belong "
                    "together: copy all of them again."
                )
        for key, names in places.items():
            if len(names) > 1:
                raise CheckpointKeyError(
                    f"{key} is in {len(names)} files of {self.path.parent}: {name_list(names)}. Each key must be in "
                    "one file only."
                )
        omitted = sorted(places.keys() - self.weight_map.keys())
        if omitted:
            raise CheckpointKeyError(
                f"{self.path} omits {len(omitted)} tensors that its files hold: "
                f"{name_list(f'{key} in {places[key][0]}' for key in omitted)}. The index and the files do not belong "
                "together: copy all of them again."
            )


def indexes_among(names: Iterable[str], suffix: str) -> list[str]:
    """Return the names of a folder's indexes, which end with `suffix`.

    If there are indexes called `model` + `suffix` or `pytorch_model` + `suffix`, return only these.
    """
    found = sorted(name for name in names if name.endswith(suffix))
    return [name for name in found if name in (f"model{suffix}", f"pytorch_model{suffix}")] or found
