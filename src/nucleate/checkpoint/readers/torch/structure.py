"""The nested values of torch files, split into a skeleton, stored tensors and stored objects."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nucleate.checkpoint.readers.file_kinds import WHOLE_MODULE
from nucleate.checkpoint.readers.torch.pickle_notes import Global, PickleRefusedError, Unmade, is_note
from nucleate.checkpoint.readers.torch.restoring import NotAllowedError, Restorer
from nucleate.checkpoint.readers.torch.tensor_notes import PickledTensor, Refused, StateDict, StorageRef
from nucleate.checkpoint.readers.torch.torch_archive import TorchArchive, is_legacy
from nucleate.checkpoint.state.tree import KeyPath, key_of
from nucleate.checkpoint.stored.data_file import DataFile, first_bytes
from nucleate.checkpoint.stored.stored_object import StoredObject
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.errors import CheckpointError, CheckpointUnreadableError

# A walk through a deeper skeleton would run out of stack.
_MAX_DEPTH = 100
# The memory that tensors with repeated elements may take, if the file is small.
_EXPANDED_BYTES = 1 << 20
# The longest name that a message shows.
_MAX_SHOWN = 200


class Structure:
    """The tensors, modules and objects that were found in archives.

    Args:
        trusts: Whether to restore objects that are not plain data by code that the file chooses.
        strict: Make every object at once, and raise an error for the first that cannot be read. Otherwise the objects
            stay as they are stored.

    Attributes:
        trusts: See above.
        strict: See above.
        tensors: The tensors by key.
        keys: The key of each tensor, by the tensor's place.
        modules: The places of the dicts that `Module.state_dict` returned.
        versions: For each of these places, the versions of the modules there, by name.
        objects: The objects by place.
    """

    def __init__(self, trusts: bool = False, strict: bool = True) -> None:
        self.trusts = trusts
        self.strict = strict
        self.tensors: dict[str, StoredTensor] = {}
        self.keys: dict[KeyPath, str] = {}
        self.modules: list[KeyPath] = []
        self.versions: dict[KeyPath, dict[str, int]] = {}
        self.objects: dict[KeyPath, StoredObject] = {}

    def skeleton(self, archive: TorchArchive, path: KeyPath = ()) -> Any:
        """Return the value of an archive with None in place of each tensor, and add the tensors to this structure.

        Args:
            archive: The archive.
            path: The place of its value in the checkpoint.

        Raises:
            CheckpointUnreadableError: A part of the value cannot be read without running code, or has the key of
                another tensor. Without `strict`, a `StoredObject` stands in its place.
            CheckpointError: A part of the value is damaged.
        """
        walk = _Walk(self, archive, path)
        return walk.split(archive.value, path)


class _Walk:
    """The walk through the value of one archive."""

    def __init__(self, structure: Structure, archive: TorchArchive, root: KeyPath) -> None:
        self._structure = structure
        self._root = root
        self._trusted: Any = None
        self._archive = archive
        self._restorer = Restorer(archive)
        # A list may hold another list many times, which again holds a list many times, and so on. That is small in the
        # file, but a walk through it never ends.
        self._num_left = 20_000 + 32 * archive.num_pickle_bytes
        self._text_left = 1_000_000 + 64 * archive.num_pickle_bytes
        self._expanded_left = max(archive.file.size_bytes, _EXPANDED_BYTES)

    def split(self, value: Any, path: KeyPath, depth: int = 0) -> Any:
        self._num_left -= 1
        if self._num_left < 0:
            raise CheckpointUnreadableError(f"{self._name} is nested too deep, or holds itself, at {_at(path)}.")
        if depth > _MAX_DEPTH:
            return self._refusal("a value that is nested too deep", path, "is nested too deep, or holds itself")
        if isinstance(value, PickledTensor):
            return self._take(value, path)
        if isinstance(value, dict) and not isinstance(value, Counter):
            if not all(map(self._is_plain, value)):
                return self._object(value, path)
            if isinstance(value, StateDict) and value.is_of_module:
                self._structure.modules.append(path)
                self._structure.versions[path] = value.versions
            kind = OrderedDict if isinstance(value, OrderedDict) else dict
            return kind((key, self.split(item, (*path, key), depth + 1)) for key, item in value.items())
        if type(value) in (list, tuple):
            return type(value)(self.split(item, (*path, place), depth + 1) for place, item in enumerate(value))
        if isinstance(value, Refused):
            return self._refusal(value.what.partition(";")[0], path, f"is {value.what}")
        if isinstance(value, StorageRef):
            return self._refusal("a bare storage", path, "is a bare storage. Save a tensor instead")
        return value if self._is_plain(value) else self._object(value, path)

    @property
    def _name(self) -> str:
        return self._archive.file.name

    def _take(self, tensor: PickledTensor, path: KeyPath) -> Any:
        """Add a tensor, and return None for its place in the skeleton."""
        key = key_of(path)
        self._text_left -= len(key)
        if self._text_left < 0:
            raise CheckpointUnreadableError(f"{self._name} has names that are too long, such as {_at(path)}.")
        if key in self._structure.tensors:
            return self._refusal(
                "a tensor", path, f"is the second tensor: the file holds two tensors called {_at(path)}. Rename one"
            )
        stored = self._archive.stored(key, tensor)
        stored.check()
        if (more := stored.size_bytes - stored.chunks[0].extent_bytes(stored.dtype)) > 0:
            self._expanded_left -= more
            if self._expanded_left < 0:
                return self._refusal(
                    "an expanded tensor",
                    path,
                    f"has the shape {stored.shape}, {stored.size_bytes} bytes, but the file holds "
                    f"{stored.chunks[0].extent_bytes(stored.dtype)}: it is an expanded tensor, or the file is damaged. "
                    "Save the tensor that it was expanded from",
                )
        self._structure.tensors[key] = stored
        self._structure.keys[path] = key
        return None

    def _is_plain(self, value: Any) -> bool:
        """Return whether a value that is not a list, or a key, is plain data."""
        self._num_left -= 1
        if is_note(value) or isinstance(value, (PickledTensor, Refused, StorageRef, dict, list)):
            return isinstance(value, Counter) and all(map(self._is_plain, (*value, *value.values())))
        return all(map(self._is_plain, value)) if isinstance(value, (tuple, set)) else True

    # --- objects

    def _refusal(self, name: str, path: KeyPath, what: str) -> Any:
        """Return the stored object for something that cannot be read, however much the file is trusted."""
        message = f"{_at(path)} in {self._name} {what}."

        def make() -> Any:
            raise CheckpointUnreadableError(message)

        return self._stored(name, path, make)

    def _object(self, value: Any, path: KeyPath) -> Any:
        """Return the stored object for a value that is not plain data."""
        return self._stored(_name_of(value), path, partial(self._made, value, path))

    def _stored(self, name: str, path: KeyPath, make: Callable[[], Any]) -> Any:
        if self._structure.strict:
            return make()
        self._structure.objects[path] = stored = StoredObject(name, make)
        return stored

    def _made(self, value: Any, path: KeyPath) -> Any:
        file = self._archive.file
        if self._structure.trusts and isinstance(file, DataFile):
            return self._trusted_value(file, path)
        try:
            return self._restorer.restore(value)
        except NotAllowedError as error:
            raise self._code(value, error.note, path) from None
        except PickleRefusedError as error:
            raise CheckpointUnreadableError(
                f"{_at(path)} in {self._name} is a {_name_of(value)} that cannot be read: {error}."
            ) from error

    def _trusted_value(self, file: DataFile, path: KeyPath) -> Any:
        """Return the object at a place as torch restores it, which runs code that the file chooses."""
        if self._trusted is None:
            # With `mmap` torch does not read the tensors, which nobody takes from here. Old files cannot be mapped.
            mapped = not is_legacy(first_bytes(file.path, 256))
            self._trusted = torch.load(file.path, map_location="cpu", mmap=mapped, weights_only=False)
        value = self._trusted
        for part in path[len(self._root) :]:
            value = value[part]
        return value

    def _code(self, value: Any, note: Global | Unmade, path: KeyPath) -> CheckpointError:
        if isinstance(value, Unmade) and value.is_module:
            return CheckpointUnreadableError(WHOLE_MODULE.format(what=f"{_at(path)} in {self._name}", name=value.name))
        is_inside = isinstance(value, Unmade) and note is not value
        what = f"{value.name} that holds a {note.name}. This" if is_inside else f"{note.name}. It"
        return CheckpointUnreadableError(
            f"{_at(path)} in {self._name} is a {what} cannot be restored without running code that the file names. "
            "nucleate refuses this, because anybody may have written the file. If you trust it, pass "
            "`weights_only=False` to `load` or `load_raw`. Or load it with `torch.load(path, weights_only=False)` and "
            "save only tensors and plain values, such as `model.state_dict()`; or allow the class with "
            "`torch.serialization.add_safe_globals`. `load_raw` with `prefix` takes weights that lie beside it."
        )


def _name_of(value: Any) -> str:
    return value.name if isinstance(value, (Global, Unmade)) else type(value).__name__


def _at(path: KeyPath) -> str:
    # A key may hold halves of characters, which no message can show.
    text = key_of(path).encode("utf-8", "backslashreplace").decode("utf-8") or "the saved value"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
