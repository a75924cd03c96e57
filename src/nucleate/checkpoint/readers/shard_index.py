"""The index of a folder with shards, as Hugging Face writes it: the key of each tensor to the file that holds it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nucleate.checkpoint.readers.strict_json import cut, parse
from nucleate.checkpoint.stored.data_file import DataFile
from nucleate.errors import CheckpointError, CheckpointKeyError, CheckpointNotFoundError, name_list

# A few times what the index of the largest models takes.
_MAX_INDEX_BYTES = 1 << 30


@dataclass(frozen=True)
class ShardIndex:
    """Which file holds which tensor.

    Attributes:
        path: The index itself; the files lie beside it.
        weight_map: The key of each tensor to the name of its file.
    """

    path: Path
    weight_map: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> ShardIndex:
        """Read and check an index.

        Raises:
            CheckpointError: It is damaged, or names a file outside of its folder.
        """
        file = DataFile(path)
        if file.size_bytes > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{path} has {file.size_bytes} bytes, too many for an index.")
        try:
            index = parse(file.read(0, file.size_bytes))
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: it is no JSON that can be read ({error}).") from error
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{path} is damaged: it has no `weight_map` from keys to names of files.")
        for key, name in weight_map.items():
            if not isinstance(name, str):
                raise CheckpointError(f"{path} gives no file for {key!r}, but {cut(name)}.")
            if os.path.basename(name) != name or name in ("", ".", "..") or "\\" in name:
                raise CheckpointError(
                    f"{path} says that {key!r} is in {cut(name)}, which is not the name of a file beside it. An "
                    "index may only name files in its own folder."
                )
        return cls(path, weight_map)

    @cached_property
    def names(self) -> list[str]:
        """The files, each once, in order."""
        return sorted(set(self.weight_map.values()))

    def open(self, name: str) -> DataFile:
        """Open a file that the index names.

        Raises:
            CheckpointNotFoundError: It is missing.
            CheckpointError: It cannot be read.
        """
        try:
            return DataFile(self.path.parent / name)
        except CheckpointNotFoundError as error:
            missing = [other for other in self.names if not (self.path.parent / other).exists()]
            key = next(key for key, other in self.weight_map.items() if other == name)
            raise CheckpointNotFoundError(
                f"{self.path} names {len(self.names)} files, of which {len(missing)} are not there: "
                f"{name_list(missing)} ({key} is in {name}). Copy them too."
            ) from error

    def compare(self, held: Mapping[str, Collection[str]]) -> None:
        """Make sure that each file holds exactly the tensors that the index places there.

        Args:
            held: The name of each file to the keys in it.

        Raises:
            CheckpointKeyError: Not so.
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
                    "one."
                )
        omitted = sorted(places.keys() - self.weight_map.keys())
        if omitted:
            raise CheckpointKeyError(
                f"{self.path} omits {len(omitted)} tensors that its files hold: "
                f"{name_list(f'{key} in {places[key][0]}' for key in omitted)}. The index and the files do not belong "
                "together: copy all of them again."
            )


def indexes_in(folder: Path, suffix: str) -> list[Path]:
    """Return the indexes in a folder whose names end with `suffix`; only `model` + suffix where that is there."""
    found = sorted(path for path in folder.iterdir() if path.name.endswith(suffix))
    return [path for path in found if path.name in (f"model{suffix}", f"pytorch_model{suffix}")] or found
