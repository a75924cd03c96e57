"""What the state that a user hands over consists of, and what its parameters are called.

This file decides what counts as a module, an optimizer, an object with a state of its own, a tensor or a
plain value, and that every rank must hand over the same. What is done with each is for the writer and the loader.
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


class Kind(Enum):
    """How an entry is saved and loaded."""

    MODULE = "a module"  # loaded in place, its keys compared both ways
    OPTIMIZER = "an optimizer"  # its state goes by the names of its parameters
    OBJECT = "an object with a state_dict"  # gets back what its state_dict returned
    TENSOR = "a tensor"  # loaded in place
    VALUE = "a plain value"  # replaced in the dict that holds it


@dataclass(frozen=True)
class Entry:
    """One thing that is saved and loaded as a whole.

    Attributes:
        path: Where it stands in the state.
        kind: How it is saved and loaded.
        value: The thing itself.
        holder: The dict that it stands in.
    """

    path: KeyPath
    kind: Kind
    value: Any
    holder: dict[str, Any]

    @property
    def key(self) -> str:
        """The name of its place."""
        return key_of(self.path)

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.key or "the model"


def entries_of(state: dict[str, Any] | nn.Module, path: KeyPath = ()) -> Iterator[Entry]:
    """Yield the entries of `state`, in its order.

    A dict that holds a module, an optimizer, an object or a tensor, however deep, is looked into. A dict of
    plain values is one value. One module by itself is one entry at the place `()`: its keys have no prefix.

    Raises:
        ConfigurationError: The state, or a dict in it, is not a dict with strings as keys.
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
            raise ConfigurationError(f"{key_of(path) or 'the state'} has the key {name!r}; its keys must be strings.")
        kind = _kind(value)
        if kind is None:
            yield from entries_of(value, (*path, name))
        else:
            yield Entry((*path, name), kind, value, state)


def _kind(value: Any) -> Kind | None:
    """Return the kind of `value`, or None for a dict that must be looked into."""
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
    """Make sure that every rank has the same entries, before their states are asked for.

    Their states may be gathered by collectives, so another order on another rank would hang.

    Args:
        entries: This rank's.
        communicator: The ranks.
        options: What else must be the same, by name.

    Raises:
        RankDisagreementError: They differ; the message names the first difference.
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
    """The keys of every parameter and buffer of some modules; more than one where it is tied.

    The modules are given with their `state_dict(keep_vars=True)`, which holds the parameters themselves. It must be
    taken first: that is what brings FSDP2 modules back to the parameters that their optimizers hold.
    """

    def __init__(self, modules: Mapping[KeyPath, tuple[nn.Module, Mapping[str, Any]]]) -> None:
        """Go through the modules, given with their state dicts, by place."""
        # Keeps every tensor alive: the id of one that is gone may be given to another.
        self._tensors = [tensor for _, state_dict in modules.values() for tensor in state_dict.values()]
        self._keys: dict[int, list[str]] = {}
        self._first: dict[KeyPath, str] = {}
        for path, (module, state_dict) in modules.items():
            for fqn, tensor in state_dict.items():
                if isinstance(tensor, Tensor):
                    self._add((*path, fqn), tensor)
            # A module that detaches in its own `_save_to_state_dict`. The state dict comes first all the same:
            # torch's activation checkpointing strips its prefix from it, but not from the names.
            for fqn, tensor in module.named_parameters(remove_duplicate=False):
                if fqn in state_dict and state_dict[fqn] is not tensor:
                    self._add((*path, fqn), tensor)

    def _add(self, place: KeyPath, tensor: Tensor) -> None:
        keys = self._keys.setdefault(id(tensor), [])
        keys.append(key_of(place))
        self._first[place] = keys[0]

    def keys(self, parameter: Tensor) -> list[str]:
        """Return the keys of `parameter`, in the order of the modules; empty where it is in none of them."""
        return self._keys.get(id(parameter), [])

    def first(self, path: KeyPath) -> str:
        """Return the key that all tensors tied to the one at `path` share: that of the first of them."""
        return self._first.get(path, key_of(path))
