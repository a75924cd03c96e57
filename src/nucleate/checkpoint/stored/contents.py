"""The contents of a checkpoint of any format, from its headers alone. Every comparison uses them."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nucleate.checkpoint.state.tree import KeyPath
from nucleate.checkpoint.stored.stored_object import StoredObject
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.errors import CheckpointUnreadableError


@dataclass(frozen=True)
class Contents:
    """The contents of one checkpoint, without its tensors.

    Attributes:
        path: The file or folder.
        format: The name of the reader that read it.
        tensors: The tensors by key. Tied tensors may have one key, or several keys for the same bytes.
        skeleton: The saved state, nested as it was, with None in place of each tensor.
        keys: The key in `tensors` of each tensor, by the tensor's place in the skeleton.
        modules: The places where a module was saved, as far as the format contains them.
        sharded: The dims that were spread over ranks at the save, by the key of each sharded tensor.
        is_complete: Whether `save` wrote the checkpoint, so that optimizer states name their parameters.
        notes: Other facts to show, such as the metadata of a safetensors file.
        versions: The versions (`Module._version`) of the modules in each saved module, by place and then by name, as
            far as the file contains them.
        objects: The values that are not plain data, by place. The same `StoredObject` stands in the skeleton.
        is_unnamed: Whether the file holds one tensor without a name. The tensor is called `tensor` here.
    """

    path: Path
    format: str
    tensors: dict[str, StoredTensor]
    skeleton: dict[str, Any]
    keys: dict[KeyPath, str]
    modules: tuple[KeyPath, ...] = ()
    sharded: dict[str, list[int]] = field(default_factory=dict)
    is_complete: bool = False
    notes: dict[str, str] = field(default_factory=dict)
    versions: dict[KeyPath, dict[str, int]] = field(default_factory=dict)
    objects: dict[KeyPath, StoredObject] = field(default_factory=dict)
    is_unnamed: bool = False

    @classmethod
    def flat(
        cls, path: Path, format: str, tensors: dict[str, StoredTensor], notes: dict[str, str] | None = None
    ) -> Contents:
        """Return the contents of a format that only holds tensors by name."""
        skeleton = dict.fromkeys(tensors)
        return cls(path, format, tensors, skeleton, {(key,): key for key in tensors}, ((),), notes=notes or {})

    @property
    def size_bytes(self) -> int:
        """The size of all tensors together; tensors that share bytes count once."""
        return sum(tensor.size_bytes for tensor in self.distinct())

    def distinct(self) -> list[StoredTensor]:
        """Return the tensors, but only one of each group that shares its bytes."""
        return list({t.identity: t for t in self.tensors.values()}.values())

    def has(self, path: KeyPath) -> bool:
        """Return whether anything was saved at `path`."""
        node: Any = self.skeleton
        for part in path:
            if not isinstance(node, dict) or part not in node:
                return False
            node = node[part]
        return True

    def at(self, path: KeyPath) -> Any:
        """Return the part of the skeleton at `path`, which must be there."""
        node: Any = self.skeleton
        for part in path:
            node = node[part]
        return node

    def check_named(self) -> None:
        """Make sure that the tensors have names.

        Raises:
            CheckpointUnreadableError: The file holds one tensor without a name.
        """
        if self.is_unnamed:
            raise CheckpointUnreadableError(
                f"{self.path} holds one tensor. A checkpoint must be a dict, such as `model.state_dict()`, so that "
                'each item has a name. Save `{"name": value}` instead, or convert the file with `nucleate convert`, '
                "which calls the tensor `tensor`."
            )

    def made(self, is_wanted: Callable[[KeyPath], bool] = lambda _: True) -> Contents:
        """Return the contents with the objects themselves in place of the stored objects.

        Args:
            is_wanted: Returns whether to make the object at a place. By default all are made.

        Raises:
            CheckpointError: An object there cannot be read; the message names its place.
        """
        wanted = [place for place in self.objects if is_wanted(place)]
        if not wanted:
            return self
        values = {place: self.objects[place].make() for place in wanted}
        objects = {place: one for place, one in self.objects.items() if place not in values}
        return dataclasses.replace(self, skeleton=_put(self.skeleton, (), values), objects=objects)


def _put(node: Any, place: KeyPath, values: dict[KeyPath, Any]) -> Any:
    """Return a copy of a skeleton with values in the given places."""
    if place in values:
        return values[place]
    if type(node) in (dict, OrderedDict):
        return type(node)((key, _put(item, (*place, key), values)) for key, item in node.items())
    if type(node) in (list, tuple):
        return type(node)(_put(item, (*place, number), values) for number, item in enumerate(node))
    return node
