"""Snapshot of a state, for any format: its tensors by key, and the skeleton that is left without them.

This file decides which tensors and values an entry adds, and the tensors' keys. `entries` decides what counts as an
entry. `rank_share` decides which boxes of a tensor this rank writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nucleate.checkpoint.rules.key_map import KeyMap
from nucleate.checkpoint.saving.agreement import agree_on_contents
from nucleate.checkpoint.saving.moved import MovedBox, moved
from nucleate.checkpoint.saving.rank_share import SavedTensor, frozen, hold
from nucleate.checkpoint.state.entries import Entry, Kind, ParameterNames
from nucleate.checkpoint.state.optimizer_names import named_state
from nucleate.checkpoint.state.plain_forms import to_plain
from nucleate.checkpoint.state.tree import KeyPath, key_of, split
from nucleate.checkpoint.state.values import VALUES, StateLayout, decode
from nucleate.cluster.save_group import SaveGroup
from nucleate.deferred import ElementSource
from nucleate.errors import CheckpointError, ConfigurationError, name_list
from nucleate.shells import state_dict as plain_state_dict

#: Returns whether a key and its value are saved.
Filter = Callable[[str, Any], bool]


class Snapshot:
    """A state at one moment. It takes the entries one after the other, modules first; then it is closed.

    Attributes:
        skeleton: The state with None where tensors stood.
        keys: The place of each tensor to its key.
        modules: The places of the modules.
        versions: The place of each module to the versions of its submodules, which torch keeps beside a state dict.
        tensors: The tensors with this rank's boxes, tied ones once. Filled by `close`.
        is_complete: Whether optimizer states name their parameters, as `save` writes them.
        values: All values as bytes `(size_bytes,)`. Set by `close` on rank 0.
        moved: This rank's boxes whose elements go to other tensors, because rules map the keys.
        whole: The element sources of tensors that rules make and that this rank has completely, by key.
    """

    def __init__(self, filters: Mapping[str, Filter] | None = None) -> None:
        self.skeleton: Any = {}
        self.keys: dict[KeyPath, str] = {}
        self.modules: list[KeyPath] = []
        self.is_complete = True
        self.versions: dict[KeyPath, Any] = {}
        self.tensors: list[SavedTensor] = []
        self.values: Tensor | None = None
        self.moved: list[MovedBox] = []
        self.whole: dict[str, ElementSource] = {}
        self._filters = filters or {}
        self._found: dict[KeyPath, Tensor] = {}
        self._modules: dict[KeyPath, tuple[Any, Any]] = {}
        self._names: ParameterNames | None = None

    @property
    def is_bare(self) -> bool:
        """Whether the state is one module alone, whose keys have no prefix."""
        return self.modules == [()]

    @property
    def sharded(self) -> dict[str, list[int]]:
        """The key of each sharded tensor to the dims that are spread over ranks."""
        return {held.key: list(held.sharded) for held in self.tensors if held.sharded is not None}

    @property
    def layout(self) -> StateLayout:
        """The structure of the state. Complete when the snapshot is closed."""
        return StateLayout(self.skeleton, self.keys, self.sharded, tuple(self.modules), self.is_complete)

    @property
    def other_values(self) -> list[str]:
        """The names of everything in the state that is not a tensor; a format for weights alone has to refuse it."""
        return [key_of(place) for place in _leaves(self.skeleton, ()) if place not in self.keys]

    @property
    def size_bytes(self) -> int:
        """The size of all tensors together."""
        return sum(held.size_bytes for held in self.tensors)

    def add(self, entry: Entry) -> None:
        """Add the present tensors and values of `entry`, without a copy of the tensors.

        Raises:
            UsageError: A tensor has no data, or an optimizer's parameters are in no module.
            ConfigurationError: There is a filter for an entry that has no keys.
            CheckpointError: A part of the entry cannot be saved.
        """
        tree = entry.value
        if entry.kind is Kind.MODULE:
            assert self._names is None, "modules come first"
            state_dict = plain_state_dict(entry.value, keep_vars=True)
            self.modules.append(entry.path)
            self.versions[entry.path] = getattr(state_dict, "_metadata", None)
            # Ties are found among all tensors, also those that a filter leaves out.
            tree = dict(state_dict)
            self._modules[entry.path] = (entry.value, tree)
        elif entry.kind is Kind.OPTIMIZER:
            tree = named_state(entry, self._parameter_names())
        elif entry.kind is Kind.OBJECT:
            tree = entry.value.state_dict()
        if entry.key in self._filters:
            tree = self._filtered(entry, tree)
        left = split(to_plain(tree), entry.path, self._found)
        if not entry.path:
            self.skeleton = left
            return
        node = self.skeleton
        for part in entry.path[:-1]:
            node = node.setdefault(part, {})
        node[entry.path[-1]] = left

    def close(self, rank: int, keys: KeyMap | None = None) -> None:
        """Give every tensor its key, and choose the boxes that this rank writes.

        Args:
            rank: The number of this process.
            keys: Other names for the tensors of the one model, and rules that change these tensors.

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
                # The first saved name of a tie is the key: a filter may have left out earlier ones.
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
            # Other threads read these boxes, and would not wait for pending work in this thread's stream.
            torch.accelerator.synchronize(device)
        if rank == 0:
            self.values = self.layout.encode()

    def agree(self, group: SaveGroup) -> None:
        """Make sure that every rank saves the same keys, shapes, dtypes and plain values.

        Raises:
            RankDisagreementError: The ranks differ; the message names what differs.
        """
        agree_on_contents(self.tensors, self.keys, self.skeleton, group)

    def _map(self, keys: KeyMap, rank: int) -> None:
        if not self.is_bare:
            raise ConfigurationError(
                "keys= maps the names of one model, but the state is a dict, whose optimizer and other entries may "
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
        # The versions belong to module names that the key map has changed.
        self.versions = {}

    def freeze(self) -> None:
        """Copy the boxes that this rank writes, so that training can change the tensors in place meanwhile."""
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
        filters: The user's argument: entry to filter; a filter alone if the state is one module; or None.
        entries: The entries of the state.

    Raises:
        ConfigurationError: A name is not an entry, or a filter cannot be called.
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
