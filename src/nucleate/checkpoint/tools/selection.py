"""Selection of a part of a checkpoint for a conversion, under other names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nucleate.checkpoint.loading.tensor_map import map_tensors
from nucleate.checkpoint.rules.key_map import KeyMap
from nucleate.checkpoint.state.tree import KeyPath, key_of
from nucleate.checkpoint.stored.contents import Contents
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.errors import CheckpointKeyError, ConfigurationError, name_list


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The part of a checkpoint to take; by default the whole checkpoint with its names.

    Attributes:
        only: The place of an entry, such as `"model"`: take this entry alone, and remove the place from its keys.
        prefix: Take only the tensors whose keys begin with this prefix, and remove it. Values are left out.
        keys: Other names for the tensors, after `prefix`; see `KeyMap`. For one model, not for a training state.
    """

    only: str = ""
    prefix: str = ""
    keys: KeyMap | None = None

    def of(self, contents: Contents) -> Contents:
        """Return the selected part of `contents`.

        Raises:
            CheckpointKeyError: There is nothing at that place or with that prefix, or two keys get one name.
            ConfigurationError: The selection would rename keys of a training state.
        """
        if self.only:
            contents = _at(contents, self.only)
        if self.prefix:
            contents = _flat(contents, _stripped(contents, self.prefix))
        if self.keys is not None:
            if any(len(place) != 1 for place in contents.keys):
                raise ConfigurationError(
                    f"{contents.path} holds more than one model: {name_list(map(str, contents.skeleton))}. Their names "
                    "refer to each other, so its keys cannot be renamed. Choose one entry by `only`, or keys by "
                    "`prefix`."
                )
            contents = _renamed(contents, self.keys)
        return contents


def tied(contents: Contents) -> dict[str, str]:
    """Return the key of each tensor to the first key of those that share its bytes.

    Tensors without elements never share bytes.
    """
    first: dict[Any, str] = {}
    return {
        key: first.setdefault(tensor.identity, key) if tensor.numel else key for key, tensor in contents.tensors.items()
    }


def names_of(contents: Contents) -> dict[str, StoredTensor]:
    """Return every name of every tensor, also all names of tied ones, to the tensor."""
    return {key_of(place): contents.tensors[key] for place, key in contents.keys.items()}


def _at(contents: Contents, name: str) -> Contents:
    """Return the contents that were saved at one place."""
    node: Any = contents.skeleton
    path: KeyPath = ()
    while isinstance(node, dict) and (found := _item(node, name)) is not None:
        key, name = found
        path = (*path, key)
        node = node[key]
        if not name:
            break
    if name or not isinstance(node, dict):
        what = "nothing" if name else "no entry with tensors"
        raise CheckpointKeyError(
            f"{contents.path} has {what} at {key_of(path)}{'.' * bool(path and name)}{name}. It has "
            f"{name_list(entries_of(contents))}."
        )
    keys = {place[len(path) :]: key for place, key in contents.keys.items() if place[: len(path)] == path}
    if not keys:
        raise CheckpointKeyError(f"{key_of(path)} in {contents.path} has no tensors.")
    modules = tuple(place[len(path) :] for place in contents.modules if place[: len(path)] == path)
    if not modules and all(len(place) == 1 for place in keys):
        modules = ((),)
    objects = {place[len(path) :]: one for place, one in contents.objects.items() if place[: len(path)] == path}
    return _keyed(dataclasses.replace(contents, skeleton=node, keys=keys, modules=modules, objects=objects))


def _item(node: dict[Any, Any], name: str) -> tuple[Any, str] | None:
    """Return the key of `node` that `name` begins with, and the rest of the name."""
    for key in node:
        if name == str(key):
            return key, ""
    for key in node:
        if name.startswith(f"{key}."):
            return key, name[len(str(key)) + 1 :]
    return None


def entries_of(contents: Contents) -> Iterable[str]:
    """Return the names at the top of a checkpoint, with one item for all tensors together."""
    loose = sum((name,) in contents.keys for name in contents.skeleton)
    names = [str(name) for name in contents.skeleton if (name,) not in contents.keys]
    return [*names, f"{loose} tensors"] if loose else names


def _stripped(contents: Contents, prefix: str) -> dict[str, str]:
    names = {key_of(place): key for place, key in contents.keys.items()}
    found = {name[len(prefix) :]: key for name, key in names.items() if name.startswith(prefix)}
    if not found or "" in found:
        some = name_list(list(names)[:5])
        raise CheckpointKeyError(f"no key of {contents.path} begins with {prefix!r} and is longer. Keys are {some}.")
    return found


def _renamed(contents: Contents, key_map: KeyMap) -> Contents:
    names = {str(place[0]): contents.tensors[key] for place, key in contents.keys.items()}
    new = map_tensors(names, key_map, str(contents.path))
    if not new:
        raise CheckpointKeyError(f"with these names, no key of {contents.path} is left. Keep at least one.")
    if "" in new:
        raise CheckpointKeyError(f"with these names, a key of {contents.path} becomes empty. Give it another name.")
    # A tensor that rules make has another shape, and was never sharded.
    keys = {id(tensor): key for key, tensor in contents.tensors.items()}
    sharded = {
        name: contents.sharded[old] for name, t in new.items() if (old := keys.get(id(t), "")) in contents.sharded
    }
    flat = _flat(dataclasses.replace(contents, tensors=new, sharded=sharded), {name: name for name in new})
    # Values stay: they are the extra state of a module.
    values = {key: value for key, value in contents.skeleton.items() if (key,) not in contents.keys}
    return dataclasses.replace(flat, skeleton={**flat.skeleton, **values})


def _flat(contents: Contents, names: dict[str, str]) -> Contents:
    """Return a model that consists of some of the tensors, given as name to key."""
    return _keyed(
        dataclasses.replace(
            contents,
            skeleton=dict.fromkeys(names),
            keys={(name,): key for name, key in names.items()},
            modules=((),),
        )
    )


def _keyed(contents: Contents) -> Contents:
    """Return contents whose keys are the tensors' places; the key of a tied tensor is its first place."""
    first = tied(contents)
    new: dict[str, str] = {}
    keys = {place: new.setdefault(first[key], key_of(place)) for place, key in contents.keys.items()}
    tensors = {name: dataclasses.replace(contents.tensors[old], key=name) for old, name in new.items()}
    sharded = {name: contents.sharded[old] for old, name in new.items() if old in contents.sharded}
    return dataclasses.replace(contents, tensors=tensors, keys=keys, sharded=sharded)


def canonical(contents: Contents) -> Contents:
    """Return the same contents with each tensor once, under the name of its first place."""
    return _keyed(contents)
