"""Saves a state as one checkpoint folder, the same for every strategy and number of ranks.

This file decides the order in which things happen on the ranks. What a state consists of is decided in `entries`
and `optimizer_state`, how the folder becomes whole in `folder`, and the format in `index` and `dcp`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nucleate.checkpoint.entries import Entry, Kind, ParameterNames, agree, entries_of
from nucleate.checkpoint.folder import CheckpointFolder, discard
from nucleate.checkpoint.index import VALUES, pack, write_marker
from nucleate.checkpoint.optimizer_state import named_state
from nucleate.checkpoint.tree import KeyPath, key_of, split
from nucleate.errors import CheckpointError

if TYPE_CHECKING:
    from nucleate.cluster.communicator import Communicator


def save(path: str | os.PathLike[str], state: dict[str, Any], communicator: Communicator) -> None:
    """Save `state` at `path`, replacing the checkpoint that is there.

    Every rank calls this with the same state. A save is whole or absent: a process that is killed at any moment
    leaves the previous checkpoint. Sharded tensors are saved whole, by the ranks that hold them; of plain tensors
    and values rank 0's count. Tied parameters are saved once.

    Args:
        path: A folder; rank 0's path counts. On several nodes it must be on a file system that all share.
        state: Modules, optimizers, objects with `state_dict` and `load_state_dict`, tensors and plain values, by
            name; dicts may be nested. An optimizer needs the module that has its parameters in the same state.
        communicator: The ranks that save together.

    Raises:
        CheckpointError: Something is in the way at `path`, a value cannot be saved, or writing failed.
        UsageError: A tensor is still deferred, or an optimizer's parameters are in no module of the state.
        ConfigurationError: The state is not a dict, or has keys that are not strings.
        RankDisagreementError: The ranks' states differ.
        RankFailedError: One of these happened on another rank.
    """
    folder = CheckpointFolder.at(communicator.broadcast(os.path.abspath(path)))
    saving = f"saving the checkpoint {folder.path}"
    with communicator.all_or_none(saving):
        entries = list(entries_of(state))
    agree(entries, communicator)
    snapshot = _Snapshot()
    for entry in sorted(entries, key=lambda entry: entry.kind is not Kind.MODULE):
        # One block for each: a state_dict may gather over the ranks, and must not wait for a rank that failed.
        with communicator.all_or_none(f"{saving}: {entry.key}"):
            snapshot.take(entry)
    draft: Path | None = None
    with communicator.all_or_none(saving):
        tensors = snapshot.tensors()
        if communicator.rank == 0:
            tensors[VALUES] = pack(snapshot.skeleton, snapshot.keys, snapshot.sharded)
            draft = folder.draft()
    try:
        _write(tensors, communicator.broadcast(draft), folder, communicator)
    finally:
        if draft is not None:
            discard(draft)


def _write(
    tensors: dict[str, Tensor], draft: Path | None, folder: CheckpointFolder, communicator: Communicator
) -> None:
    from nucleate.checkpoint import dcp

    assert draft is not None, "rank 0 made it"
    dcp.write(tensors, draft, communicator.rank, communicator.world_size)
    with communicator.all_or_none(f"saving the checkpoint {folder.path}"):
        if communicator.rank == 0:
            # Rank 0 must see what the other ranks wrote.
            dcp.headers(draft)
            try:
                write_marker(draft, communicator.world_size)
                folder.commit(draft)
            except OSError as error:
                raise CheckpointError(f"a checkpoint cannot be written to {folder.path}: {error}") from error


class _Snapshot:
    """The state of all entries: modules first, then what goes by their parameters' names."""

    def __init__(self) -> None:
        self.skeleton: dict[str, Any] = {}
        self.keys: dict[KeyPath, str] = {}
        self.sharded: dict[str, list[int]] = {}
        self._tensors: dict[KeyPath, Tensor] = {}
        self._modules: dict[KeyPath, tuple[Any, Any]] = {}
        self._names: ParameterNames | None = None

    def take(self, entry: Entry) -> None:
        """Add what `entry` holds now; tensors are not copied."""
        tree = entry.value
        if entry.kind is Kind.MODULE:
            assert self._names is None, "modules come first"
            tree = dict(entry.value.state_dict(keep_vars=True))
            self._modules[entry.path] = (entry.value, tree)
        elif entry.kind is Kind.OPTIMIZER:
            tree = named_state(entry, self._parameter_names())
        elif entry.kind is Kind.OBJECT:
            tree = entry.value.state_dict()
        node = self.skeleton
        for part in entry.path[:-1]:
            node = node.setdefault(part, {})
        node[entry.path[-1]] = split(tree, entry.path, self._tensors)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to write by key, tied ones once, and set `keys` and `sharded`.

        Raises:
            CheckpointError: Two of them would have the same key, or one is not reduced over the ranks yet.
        """
        from nucleate.checkpoint.dcp import is_unreduced, sharded_dims

        names = self._parameter_names()
        written: dict[str, Tensor] = {}
        places: dict[str, KeyPath] = {}
        for path, tensor in self._tensors.items():
            key = self.keys[path] = names.first(path)
            if key != key_of(path):
                continue
            # DCP would take one rank's summand for the whole (torch/distributed/checkpoint/planner_helpers.py, 2.13).
            if is_unreduced(tensor):
                raise CheckpointError(f"{key} is a DTensor that is not reduced yet. Save `tensor.full_tensor()`.")
            if key in written or key == VALUES:
                raise CheckpointError(
                    f"two tensors of the state are both called {key}: {path} and {places.get(key, VALUES)}. Rename one."
                )
            written[key], places[key] = tensor, path
            if (dims := sharded_dims(tensor)) is not None:
                self.sharded[key] = dims
        return written

    def _parameter_names(self) -> ParameterNames:
        if self._names is None:
            self._names = ParameterNames(self._modules)
        return self._names
