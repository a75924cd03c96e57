"""What is to be written, whatever the format: tensors by key, and the skeleton that is left without them.

This file decides what an entry contributes and what tensors are called. What an entry is, is decided in `entries`,
what of a tensor this rank writes in `held`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nucleate.checkpoint.rules.key_map import KeyMap
from nucleate.checkpoint.saving.moved import MovedBox, moved
from nucleate.checkpoint.saving.rank_share import HeldTensor, frozen, hold
from nucleate.checkpoint.state.entries import Entry, Kind, ParameterNames
from nucleate.checkpoint.state.optimizer_names import named_state
from nucleate.checkpoint.state.tree import KeyPath, key_of, split
from nucleate.checkpoint.state.values import VALUES, StateLayout, decode
from nucleate.cluster.save_group import SaveGroup
from nucleate.deferred import Given
from nucleate.errors import CheckpointError, ConfigurationError, RankDisagreementError, name_list

#: Says of a key and its value whether they are saved.
Filter = Callable[[str, Any], bool]


class Snapshot:
    """A state at one moment. Entries are taken one after the other, modules first; then it is closed.

    Attributes:
        skeleton: The state with None where tensors stood.
        keys: The place of each tensor to its key.
        modules: The places of the modules.
        versions: The place of each module to what torch keeps beside a state dict, the versions of its submodules.
        tensors: The tensors as this rank sees them, tied ones once; there when it is closed.
        is_complete: Whether optimizers go by the names of their parameters, as `save` has it.
        values: On rank 0, when it is closed: all that is no tensor, as bytes `(size_bytes,)`.
        moved: What this rank writes of tensors whose elements go elsewhere, where keys are mapped by rules.
        whole: Elements of tensors that such rules make, by key, where this rank has all of them.
    """

    def __init__(self, filters: Mapping[str, Filter] | None = None) -> None:
        self.skeleton: Any = {}
        self.keys: dict[KeyPath, str] = {}
        self.modules: list[KeyPath] = []
        self.is_complete = True
        self.versions: dict[KeyPath, Any] = {}
        self.tensors: list[HeldTensor] = []
        self.values: Tensor | None = None
        self.moved: list[MovedBox] = []
        self.whole: dict[str, Given] = {}
        self._filters = filters or {}
        self._found: dict[KeyPath, Tensor] = {}
        self._modules: dict[KeyPath, tuple[Any, Any]] = {}
        self._names: ParameterNames | None = None

    @property
    def is_bare(self) -> bool:
        """Whether the state is one module by itself, whose keys have no prefix."""
        return self.modules == [()]

    @property
    def sharded(self) -> dict[str, list[int]]:
        """The key of each tensor that is sharded to the dims that are spread over ranks."""
        return {held.key: list(held.sharded) for held in self.tensors if held.sharded is not None}

    @property
    def layout(self) -> StateLayout:
        """How the state is put together, when the snapshot is closed."""
        return StateLayout(self.skeleton, self.keys, self.sharded, tuple(self.modules), self.is_complete)

    @property
    def other_values(self) -> list[str]:
        """The names of everything in the state that is not a tensor; a format for weights alone has to refuse it."""
        return [key_of(place) for place in _leaves(self.skeleton, ()) if place not in self.keys]

    @property
    def size_bytes(self) -> int:
        """How large all tensors are together."""
        return sum(held.size_bytes for held in self.tensors)

    def take(self, entry: Entry) -> None:
        """Add what `entry` holds now; tensors are not copied.

        Raises:
            UsageError: A tensor has no data, or an optimizer's parameters are in no module.
            ConfigurationError: There is a filter for an entry that has no keys.
            CheckpointError: Something in it cannot be saved.
        """
        tree = entry.value
        if entry.kind is Kind.MODULE:
            assert self._names is None, "modules come first"
            state_dict = entry.value.state_dict(keep_vars=True)
            self.modules.append(entry.path)
            self.versions[entry.path] = getattr(state_dict, "_metadata", None)
            # Ties are told among all tensors, those that a filter leaves out included.
            tree = dict(state_dict)
            self._modules[entry.path] = (entry.value, tree)
        elif entry.kind is Kind.OPTIMIZER:
            tree = named_state(entry, self._parameter_names())
        elif entry.kind is Kind.OBJECT:
            tree = entry.value.state_dict()
        if entry.key in self._filters:
            tree = self._filtered(entry, tree)
        left = split(tree, entry.path, self._found)
        if not entry.path:
            self.skeleton = left
            return
        node = self.skeleton
        for part in entry.path[:-1]:
            node = node.setdefault(part, {})
        node[entry.path[-1]] = left

    def close(self, rank: int, keys: KeyMap | None = None) -> None:
        """Give every tensor its key, and find out what this rank writes.

        Args:
            rank: This process among all.
            keys: Other names for the tensors of the one model, and what is done to them.

        Raises:
            CheckpointError: Two tensors would have the same key, one is not reduced over the ranks yet, or a value
                cannot be saved.
        """
        names = self._parameter_names()
        first: dict[str, str] = {}
        written: dict[str, Tensor] = {}
        places: dict[str, KeyPath] = {}
        for path, tensor in self._found.items():
            key = key_of(path)
            if path[:-1] in self._modules:
                # The first of a tie that is saved gives the name; a filter may have left out the very first.
                key = first.setdefault(names.first(path), key)
            self.keys[path] = key
            if key != key_of(path):
                continue
            if key in written or key == VALUES:
                raise CheckpointError(
                    f"two tensors of the state are both called {key}: {path} and {places.get(key, VALUES)}. Rename one."
                )
            written[key], places[key] = tensor, path
        self.tensors = hold(written, rank)
        if keys is not None:
            self._map(keys, rank)
        devices = {box.values.device for held in self.tensors for box in held.boxes}
        devices |= {box.values.device for box in self.moved}
        for device in (device for device in devices if device.type not in ("cpu", "meta")):
            # Other threads read them, and would not wait for what this one's stream still has to do.
            torch.accelerator.synchronize(device)
        if rank == 0:
            self.values = self.layout.encode()

    def agree(self, group: SaveGroup) -> None:
        """Make sure that every rank has the same sharded tensors.

        Raises:
            RankDisagreementError: Not so; the message names the first difference.
        """
        mine = [f"{held.key} {held.dtype} {held.shape}" for held in self.tensors if held.sharded is not None]
        if len(set(group.gather_objects(hash_of(mine)))) == 1:
            return
        everyone = group.gather_objects(mine)
        rank = next(rank for rank, theirs in enumerate(everyone) if theirs != everyone[0])
        pairs = zip([*everyone[0], "nothing"], [*everyone[rank], "nothing"], strict=False)
        here, there = next(pair for pair in pairs if pair[0] != pair[1])
        raise RankDisagreementError(
            f"the ranks' sharded tensors differ: rank 0 has {here} where rank {rank} has {there}. Every rank must save "
            "the same state, in the same order."
        )

    def _map(self, keys: KeyMap, rank: int) -> None:
        if not self.is_bare:
            raise ConfigurationError(
                "keys= maps the names of one model, and the state is a dict, in which an optimizer and others may "
                "refer to these names. Save the model by itself: `save(path, model, keys=...)`."
            )
        names = {str(place[0]): key for place, key in self.keys.items()}
        result = moved(self.tensors, names, keys, rank)
        values = {name: value for name, value in self.skeleton.items() if (name,) not in self.keys}
        twice = sorted(set(values) & set(result.names))
        if twice:
            raise CheckpointError(f"{name_list(twice)} would be tensors and other values of the model at once.")
        self.tensors, self.moved, self.whole = result.tensors, result.boxes, result.whole
        self.keys = {(name,): key for name, key in result.names.items()}
        self.skeleton = {**dict.fromkeys(result.names), **values}
        # They are those of modules that have other names now.
        self.versions = {}

    def freeze(self) -> None:
        """Copy what this rank writes, so that training can go on in place while it is written."""
        self.tensors = frozen(self.tensors)
        for box in self.moved:
            box.values = torch.empty(box.values.shape, dtype=box.values.dtype, device="cpu").copy_(box.values)
        if self.values is not None:
            self.skeleton = decode(self.values)["skeleton"]
        self._forget()

    def _forget(self) -> None:
        self._found, self._modules, self._names = {}, {}, None

    def _filtered(self, entry: Entry, tree: Any) -> Any:
        keep = self._filters[entry.key]
        if not isinstance(tree, Mapping):
            raise ConfigurationError(
                f"filter: {entry.key} is {entry.kind.value}, which has no keys to choose from. Filters are for "
                "modules, optimizers, objects with a state_dict and dicts."
            )
        return {key: value for key, value in tree.items() if keep(key, value)}

    def _parameter_names(self) -> ParameterNames:
        if self._names is None:
            self._names = ParameterNames(self._modules)
        return self._names


def filters_for(filters: Any, entries: list[Entry]) -> dict[str, Filter]:
    """Return the filter of each entry by its key.

    Args:
        filters: What the user gave: entry to filter; a filter alone where the state is one module; or None.
        entries: The entries of the state.

    Raises:
        ConfigurationError: A name is no entry, or a filter cannot be called.
    """
    if filters is None:
        return {}
    known = [entry.key for entry in entries]
    if known == [""] and callable(filters):
        return {"": filters}
    if not isinstance(filters, Mapping):
        raise ConfigurationError(
            f"filter is a {type(filters).__name__}; it must be a dict of entries to functions, such as "
            '{"model": lambda key, value: "adapter" in key}.'
        )
    strange = [repr(name) for name in filters if name not in known]
    if strange:
        raise ConfigurationError(
            f"filter names {name_list(strange)}, but the entries of the state are {name_list(map(repr, known))}."
        )
    for name, keep in filters.items():
        if not callable(keep):
            raise ConfigurationError(
                f"filter[{name!r}] is {keep!r}; it must be a function of a key and its value that returns a bool."
            )
    return dict(filters)


def _leaves(node: Any, path: KeyPath) -> Iterator[KeyPath]:
    """Yield the places of all values that are not dicts, lists or tuples; an empty one of these counts as a value."""
    items: Any = ()
    if isinstance(node, Mapping):
        items = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    if not items or not node:
        yield path
    for key, item in items:
        yield from _leaves(item, (*path, key))


def hash_of(lines: list[str]) -> str:
    """Return a short text that tells whether two lists are equal."""
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
