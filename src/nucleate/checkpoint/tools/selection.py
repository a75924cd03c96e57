"""A part of what a checkpoint holds, under other names: what a conversion takes of it."""

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
    """What is taken of a checkpoint; by default all of it, as it is.

    Attributes:
        only: The place of an entry, such as `"model"`: that alone, without the place before its keys.
        prefix: Only tensors whose keys begin with this, without it. Values that are no tensors are left out.
        keys: Other names for the tensors, after `prefix`; see `KeyMap`. For one model, not for a training state.
    """

    only: str = ""
    prefix: str = ""
    keys: KeyMap | None = None

    def of(self, contents: Contents) -> Contents:
        """Return the part of `contents` that is selected.

        Raises:
            CheckpointKeyError: There is nothing at that place or with that prefix, or two keys get one name.
            ConfigurationError: Keys of a training state are to be renamed.
        """
        if self.only:
            contents = _at(contents, self.only)
        if self.prefix:
            contents = _flat(contents, _stripped(contents, self.prefix))
        if self.keys is not None:
            if any(len(place) != 1 for place in contents.keys):
                raise ConfigurationError(
                    f"{contents.path} holds more than one model, {name_list(map(str, contents.skeleton))}, whose names "
                    "refer to each other, so its keys cannot be renamed. Choose one entry by `only`, or keys by "
                    "`prefix`."
                )
            contents = _renamed(contents, self.keys)
        return contents


def tied(contents: Contents) -> dict[str, str]:
    """Return the key of each tensor to the first key of those that share its bytes.

    Tensors of no elements share nothing, wherever they lie.
    """
    first: dict[Any, str] = {}
    return {
        key: first.setdefault(tensor.identity, key) if tensor.numel else key for key, tensor in contents.tensors.items()
    }


def names_of(contents: Contents) -> dict[str, StoredTensor]:
    """Return every name that a tensor has, those of tied ones too, to the tensor."""
    return {key_of(place): contents.tensors[key] for place, key in contents.keys.items()}


def _at(contents: Contents, name: str) -> Contents:
    """Return what was saved at one place."""
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
    return _keyed(dataclasses.replace(contents, skeleton=node, keys=keys, modules=modules))


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
    """Return the names of what stands at the top of a checkpoint; those of tensors as one."""
    loose = sum((name,) in contents.keys for name in contents.skeleton)
    names = [str(name) for name in contents.skeleton if (name,) not in contents.keys]
    return [*names, f"{loose} tensors"] if loose else names


def _stripped(contents: Contents, prefix: str) -> dict[str, str]:
    names = {key_of(place): key for place, key in contents.keys.items()}
    found = {name[len(prefix) :]: key for name, key in names.items() if name.startswith(prefix)}
    if not found or "" in found:
        some = name_list(list(names)[:5])
        raise CheckpointKeyError(f"no key of {contents.path} begins with {prefix!r} and goes on. Keys are {some}.")
    return found


def _renamed(contents: Contents, key_map: KeyMap) -> Contents:
    names = {str(place[0]): contents.tensors[key] for place, key in contents.keys.items()}
    new = map_tensors(names, key_map, str(contents.path))
    if not new or "" in new:
        raise CheckpointKeyError(f"with these names, {'a' if new else 'no'} key of {contents.path} is left empty.")
    # What rules make has another shape, and was never sharded.
    keys = {id(tensor): key for key, tensor in contents.tensors.items()}
    sharded = {
        name: contents.sharded[old] for name, t in new.items() if (old := keys.get(id(t), "")) in contents.sharded
    }
    flat = _flat(dataclasses.replace(contents, tensors=new, sharded=sharded), {name: name for name in new})
    # What is no tensor stays: the extra state of a module.
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
    """Return contents whose tensors have the names of their places as keys, that of the first where they are tied."""
    first = tied(contents)
    new: dict[str, str] = {}
    keys = {place: new.setdefault(first[key], key_of(place)) for place, key in contents.keys.items()}
    tensors = {name: dataclasses.replace(contents.tensors[old], key=name) for old, name in new.items()}
    sharded = {name: contents.sharded[old] for old, name in new.items() if old in contents.sharded}
    return dataclasses.replace(contents, tensors=tensors, keys=keys, sharded=sharded)


def canonical(contents: Contents) -> Contents:
    """Return the same contents with every tensor once, under the name of its first place."""
    return _keyed(contents)
