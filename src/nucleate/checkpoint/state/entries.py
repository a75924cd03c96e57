"""Entries of the state that a user saves or loads, and the names of its parameters.

This file decides which items count as a module, an optimizer, an object with a `state_dict`, a tensor or a plain value.
It also makes sure that every rank has the same entries. The writer and the loader decide how to treat each kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nucleate.checkpoint.state.tree import KeyPath, key_of
from nucleate.cluster.ranks import Ranks
from nucleate.errors import ConfigurationError, RankDisagreementError
from nucleate.shells import named_parameters


class Kind(Enum):
    """The kind of an entry: it decides how the entry is saved and loaded."""

    MODULE = "a module"  # loaded in place, its keys compared both ways
    OPTIMIZER = "an optimizer"  # its state uses the names of its parameters
    OBJECT = "an object with a state_dict"  # its load_state_dict gets the saved state
    TENSOR = "a tensor"  # loaded in place
    VALUE = "a plain value"  # replaced in the dict that holds it


@dataclass(frozen=True)
class Entry:
    """One item of a state, which is saved and loaded as a whole.

    Attributes:
        path: The entry's place in the state.
        kind: The kind, which decides how the entry is saved and loaded.
        value: The module, optimizer, object, tensor or value.
        holder: The dict that contains the entry.
    """

    path: KeyPath
    kind: Kind
    value: Any
    holder: dict[str, Any]

    @property
    def key(self) -> str:
        """The name of the entry's place."""
        return key_of(self.path)

    @property
    def title(self) -> str:
        """The entry's name in messages."""
        return self.key or "the model"


def entries_of(state: dict[str, Any] | nn.Module, path: KeyPath = ()) -> Iterator[Entry]:
    """Yield the entries of `state`, in its order.

    A dict that holds a module, an optimizer, an object or a tensor at any depth gives one entry for each item. A dict
    of plain values is one value. One module alone is one entry at the place `()`: its keys have no prefix.

    Raises:
        ConfigurationError: The state is not a dict or a module, or a dict in the state has keys that are not strings.
    """
    if isinstance(state, nn.Module):
        yield Entry((), Kind.MODULE, state, {})
        return
    if not isinstance(state, dict):
        raise ConfigurationError(
            f"the state is a {type(state).__name__}; it must be a dict, such as "
            '{"model": model, "optimizer": optimizer, "step": step}, or one module.'
        )
    for name, value in state.items():
        if not isinstance(name, str) or not name:
            raise ConfigurationError(
                f"{key_of(path) or 'the state'} has the key {name!r}; its keys must be strings that are not empty."
            )
        kind = _kind(value)
        if kind is None:
            yield from entries_of(value, (*path, name))
        else:
            yield Entry((*path, name), kind, value, state)


def _kind(value: Any) -> Kind | None:
    """Return the kind of `value`, or None for a dict whose items are entries."""
    if isinstance(value, nn.Module):
        return Kind.MODULE
    if isinstance(value, Optimizer):
        return Kind.OPTIMIZER
    if isinstance(value, Tensor):
        return Kind.TENSOR
    if isinstance(value, type):
        return Kind.VALUE
    # Schedulers, scalers, loaders and the like share no base class; these two methods are their protocol.
    if callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)):
        return Kind.OBJECT
    if isinstance(value, dict) and any(_kind(item) is not Kind.VALUE for item in value.values()):
        return None
    return Kind.VALUE


def agree(entries: list[Entry], communicator: Ranks, options: Mapping[str, object] | None = None) -> None:
    """Make sure that every rank has the same entries, before anything calls their `state_dict`.

    A `state_dict` may use collectives, so another order on another rank would hang.

    Args:
        entries: This rank's entries.
        communicator: The ranks.
        options: Options that must be the same too, by name.

    Raises:
        RankDisagreementError: The ranks differ; the message names the first difference.
    """
    mine = [f"{name}={option!r}" for name, option in (options or {}).items()]
    mine += [f"{entry.title}: {entry.kind.value}" for entry in entries]
    everyone = communicator.gather_objects(mine)
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            first = next(
                pair
                for pair in zip([*everyone[0], "nothing"], [*theirs, "nothing"], strict=False)
                if pair[0] != pair[1]
            )
            raise RankDisagreementError(
                f"the ranks' states differ: rank 0 has {first[0]} where rank {rank} has {first[1]}. Every rank must "
                "save and load the same state, in the same order, with the same options."
            )


class ParameterNames:
    """The keys of every parameter and buffer of some modules; a tied one has several.

    Each module comes with its `state_dict(keep_vars=True)`, which holds the parameters themselves, under plain keys
    (`nucleate.shells`). The caller must take this state dict first: `state_dict` brings FSDP2 modules back to the
    parameters that their optimizers hold.
    """

    def __init__(self, modules: Mapping[KeyPath, tuple[nn.Module, Mapping[str, Any]]]) -> None:
        """Collect the names from modules and their state dicts, given by place."""
        # Keep every tensor alive: Python may give the id of a deleted tensor to another one.
        self._tensors = [tensor for _, state_dict in modules.values() for tensor in state_dict.values()]
        self._keys: dict[int, list[str]] = {}
        self._first: dict[KeyPath, str] = {}
        for path, (module, state_dict) in modules.items():
            for fqn, tensor in state_dict.items():
                if isinstance(tensor, Tensor):
                    self._add((*path, fqn), tensor)
            # For a module that detaches in its own `_save_to_state_dict`.
            for fqn, tensor in named_parameters(module, remove_duplicate=False):
                if fqn in state_dict and state_dict[fqn] is not tensor:
                    self._add((*path, fqn), tensor)

    def _add(self, place: KeyPath, tensor: Tensor) -> None:
        keys = self._keys.setdefault(id(tensor), [])
        keys.append(key_of(place))
        self._first[place] = keys[0]

    def keys(self, parameter: Tensor) -> list[str]:
        """Return the keys of `parameter`, in the order of the modules; empty if no module has it."""
        return self._keys.get(id(parameter), [])

    def first(self, path: KeyPath) -> str:
        """Return the key that stands for all tensors tied to the one at `path`: the key of the first one."""
        return self._first.get(path, key_of(path))
