"""The nested values of torch files, split into a skeleton and stored tensors."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import torch

from nucleate.checkpoint.readers.torch.pickled import Global, Unmade
from nucleate.checkpoint.readers.torch.torch_archive import TorchArchive, is_legacy
from nucleate.checkpoint.readers.torch.torch_pickle import PickledTensor, Refused, StateDict, StorageRef, unwrapped
from nucleate.checkpoint.state.tree import KeyPath, key_of
from nucleate.checkpoint.stored.data_file import DataFile, first_bytes
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.errors import CheckpointError

# A walk through a deeper skeleton would run out of stack.
_MAX_DEPTH = 100
# The memory that tensors with repeated elements may take, if the file is small.
_EXPANDED_BYTES = 1 << 20


class Structure:
    """The tensors and modules that were found in archives.

    Args:
        trusts: Whether to restore objects that are not plain data by code that the file chooses.

    Attributes:
        trusts: See above.
        tensors: The tensors by key.
        keys: The key of each tensor, by the tensor's place.
        modules: The places of the dicts that `Module.state_dict` returned.
        versions: For each of these places, the versions of the modules there, by name.
    """

    def __init__(self, trusts: bool = False) -> None:
        self.trusts = trusts
        self.tensors: dict[str, StoredTensor] = {}
        self.keys: dict[KeyPath, str] = {}
        self.modules: list[KeyPath] = []
        self.versions: dict[KeyPath, dict[str, int]] = {}

    def skeleton(self, archive: TorchArchive, path: KeyPath = ()) -> Any:
        """Return the value of an archive with None in place of each tensor, and add the tensors to this structure.

        Args:
            archive: The archive.
            path: The place of its value in the checkpoint.

        Raises:
            CheckpointError: A part of the value cannot be read without running code, is damaged, or has the key of
                another tensor.
        """
        walk = _Walk(self, archive, path)
        return walk.split(archive.value, path)


class _Walk:
    """The walk through the value of one archive."""

    def __init__(self, structure: Structure, archive: TorchArchive, root: KeyPath) -> None:
        self._structure = structure
        self._root = root
        self._restored: Any = None
        self._archive = archive
        # A list may hold another list many times, which again holds a list many times, and so on. That is small in the
        # file, but a walk through it never ends.
        self._num_left = 100_000 + archive.file.size_bytes
        self._expanded_left = max(archive.file.size_bytes, _EXPANDED_BYTES)

    def split(self, value: Any, path: KeyPath, depth: int = 0) -> Any:
        self._num_left -= 1
        if depth > _MAX_DEPTH or self._num_left < 0:
            raise CheckpointError(f"{self._name} is nested too deep, or holds itself, at {_at(path)}.")
        if isinstance(value, PickledTensor):
            self._take(value, path)
            return None
        if isinstance(value, dict) and not isinstance(value, Counter):
            for key in value:
                self._check_key(key, path)
            if isinstance(value, StateDict) and value.is_of_module:
                self._structure.modules.append(path)
                self._structure.versions[path] = value.versions
            kind = OrderedDict if isinstance(value, OrderedDict) else dict
            return kind((key, self.split(item, (*path, key), depth + 1)) for key, item in value.items())
        if type(value) in (list, tuple):
            return type(value)(self.split(item, (*path, place), depth + 1) for place, item in enumerate(value))
        file = self._archive.file
        if self._structure.trusts and isinstance(value, (Global, Unmade)) and isinstance(file, DataFile):
            return self._restore(file, path)
        self._check(value, path)
        return unwrapped(value)

    def _restore(self, file: DataFile, path: KeyPath) -> Any:
        """Return the object at a place as torch restores it, which runs code that the file chooses."""
        if self._restored is None:
            # With `mmap` torch does not read the tensors, which nobody takes from here. Old files cannot be mapped.
            mapped = not is_legacy(first_bytes(file.path, 256))
            self._restored = torch.load(file.path, map_location="cpu", mmap=mapped, weights_only=False)
        value = self._restored
        for part in path[len(self._root) :]:
            value = value[part]
        return value

    @property
    def _name(self) -> str:
        return self._archive.file.name

    def _take(self, tensor: PickledTensor, path: KeyPath) -> None:
        key = key_of(path)
        if key in self._structure.tensors:
            raise CheckpointError(f"{self._name} holds two tensors called {key}. Rename one and save it again.")
        stored = self._archive.stored(key, tensor)
        stored.check()
        if (more := stored.size_bytes - stored.chunks[0].extent_bytes(stored.dtype)) > 0:
            self._expanded_left -= more
            if self._expanded_left < 0:
                raise CheckpointError(
                    f"{key} in {self._name} has the shape {stored.shape}, {stored.size_bytes} bytes, but the file "
                    f"holds {stored.chunks[0].extent_bytes(stored.dtype)}: it is an expanded tensor, or the file is "
                    "damaged. Save the tensor that it was expanded from."
                )
        self._structure.tensors[key] = stored
        self._structure.keys[path] = key

    def _check(self, value: Any, path: KeyPath) -> None:
        """Raise an error if `value`, which is not a dict, list or tuple, is not a plain value."""
        if isinstance(value, (Global, Unmade)):
            raise self._code(value, path)
        if isinstance(value, Refused):
            raise CheckpointError(f"{_at(path)} in {self._name} is {value.what}.")
        if isinstance(value, StorageRef):
            raise CheckpointError(f"{_at(path)} in {self._name} is a bare storage. Save a tensor instead.")
        if isinstance(value, (set, Counter)):
            for item in value:
                self._check_key(item, path)
            for item in value.values() if isinstance(value, Counter) else ():
                self._check_key(item, path)

    def _check_key(self, value: Any, path: KeyPath) -> None:
        """Raise an error if `value`, an item of a set or a key, is not a plain value."""
        self._num_left -= 1
        if isinstance(value, (PickledTensor, dict, list)):
            raise CheckpointError(f"{_at(path)} in {self._name} holds tensors or containers in a set, or as keys.")
        if isinstance(value, tuple):
            for part in value:
                self._check_key(part, path)
        else:
            self._check(value, path)

    def _code(self, value: Global | Unmade, path: KeyPath) -> CheckpointError:
        return CheckpointError(
            f"{_at(path)} in {self._name} is a {value.name}. It cannot be restored without running code that the file "
            "names. nucleate refuses this, because anybody may have written the file. If you trust it, pass "
            "`weights_only=False` to `load` or `load_raw`. Or load it with `torch.load(path, weights_only=False)` and "
            "save only tensors and plain values, such as `model.state_dict()`; or allow the class with "
            "`torch.serialization.add_safe_globals`."
        )


def _at(path: KeyPath) -> str:
    return key_of(path) or "the saved value"
