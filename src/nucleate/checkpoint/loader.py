"""Loads a checkpoint folder into a state, after everything has been compared.

This file decides what each kind of entry takes from a checkpoint, and the order in which things happen on the
ranks. What fits is decided in `plan`.
"""

from __future__ import annotations

import os
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nucleate.checkpoint.entries import Entry, Kind, ParameterNames, agree, entries_of
from nucleate.checkpoint.folder import CheckpointFolder
from nucleate.checkpoint.index import Index
from nucleate.checkpoint.optimizer_state import plan_optimizer
from nucleate.checkpoint.plan import Plan
from nucleate.checkpoint.tree import KeyPath, check_tensor, key_of, split
from nucleate.errors import name_list

if TYPE_CHECKING:
    from nucleate.cluster.communicator import Communicator


def load(
    path: str | os.PathLike[str],
    state: dict[str, Any] | None,
    communicator: Communicator,
    strict: bool = True,
    *,
    remainder: bool = True,
) -> dict[str, Any]:
    """Load the checkpoint at `path` into `state`, and return what was not asked for.

    Modules and tensors are filled in place, optimizers and objects through their `load_state_dict`, plain values
    are replaced in the dict that holds them. A rank reads only what it holds of sharded tensors. Every comparison
    is made before anything changes; only a disk that fails while tensors are read can leave a mix.

    Args:
        path: What was given to `save`; rank 0's path counts.
        state: What to load into, as it was given to `save`, or a part of it; None for all into the remainder.
        communicator: The ranks that load together.
        strict: Refuse keys that are missing or unexpected inside of what is asked for. Otherwise what is missing
            stays as it is, with a warning, and what is unexpected goes to the remainder. Shapes must always fit.
        remainder: Read what was not asked for, whole, on every rank. False saves that memory.

    Returns:
        What the state did not ask for, tensors on the CPU; empty with `remainder=False`.

    Raises:
        CheckpointNotFoundError: There is no checkpoint at `path`.
        CheckpointKeyError: Keys are missing or unexpected.
        ShapeMismatchError: Tensors have other shapes.
        CheckpointError: The checkpoint is damaged, something in it is of another kind, or reading failed.
        UsageError: A tensor is still deferred, or an optimizer's parameters are in no module of the state.
        ConfigurationError: The state is not a dict, or has keys that are not strings.
        RankDisagreementError: The ranks' states differ.
        RankFailedError: One of these happened on another rank.
    """
    from nucleate.checkpoint import dcp

    folder = CheckpointFolder.at(communicator.broadcast(os.path.abspath(path)))
    loading = f"loading the checkpoint {folder.path}"
    with communicator.all_or_none(loading):
        plan = Plan(Index.read(folder.locate()))
        entries = list(entries_of({} if state is None else state))
    agree(entries, communicator)
    modules: dict[KeyPath, tuple[Any, Any]] = {}
    names = ParameterNames({})
    rest: dict[str, Any] = {}
    for entry in sorted(entries, key=lambda entry: entry.kind is not Kind.MODULE):
        with communicator.all_or_none(f"{loading}: {entry.key}"):
            if entry.kind is Kind.MODULE:
                modules[entry.path] = (entry.value, entry.value.state_dict(keep_vars=True))
                names = ParameterNames(modules)
            elif plan.index.has(entry.path):
                _PLANNERS[entry.kind](plan, entry, names)
            else:
                plan.missing.append(entry.key)
    with communicator.all_or_none(loading):
        stored: dict[str, str] = {}
        for place, (module, state_dict) in modules.items():
            if plan.index.has(place):
                _plan_module(plan, place, state_dict, names, stored)
                plan.finish.append((key_of(place), partial(module.load_state_dict, state_dict)))
            else:
                plan.missing.append(key_of(place))
        plan.check(strict)
        if remainder:
            rest = _remainder(plan, entries)
    for targets in plan.passes:
        dcp.read(targets, plan.index.folder, plan.index.metadata, distributed=communicator.world_size > 1)
    order = {entry.key: place for place, entry in enumerate(entries)}
    for key, finish in sorted(plan.finish, key=lambda item: order[item[0]]):
        with communicator.all_or_none(f"{loading}: {key}"):
            finish()
    # Last: where warnings are errors, this one must not leave the other ranks waiting.
    if plan.missing and communicator.rank == 0:
        warnings.warn(f"{loading}: not in it, and left as they were: {name_list(plan.missing)}.", stacklevel=2)
    return rest


def _plan_module(plan: Plan, path: KeyPath, state_dict: Any, names: ParameterNames, stored: dict[str, str]) -> None:
    """Add the reading of a module to `plan`: straight into its parameters.

    Args:
        plan: Receives what to read and what does not fit.
        path: Where the module stands in the state.
        state_dict: The module's own; what is no tensor is replaced in it.
        names: The keys of the parameters of all modules.
        stored: For tied tensors: the first key of each that is read already, to the key it is stored under.
    """
    saved = plan.index.at(path)
    if not isinstance(saved, dict):
        plan.mismatched.append(f"{key_of(path)} is a module here but not in the checkpoint")
        return
    absent: list[KeyPath] = []
    for fqn, value in state_dict.items():
        place = (*path, fqn)
        if not isinstance(value, Tensor):
            if fqn in saved:
                state_dict[fqn] = plan.tree(place)
            else:
                plan.missing.append(key_of(place))
            continue
        check_tensor(value, key_of(place))
        key, first = plan.index.keys.get(place), names.first(place)
        if key is None:
            absent.append(place)
        elif first not in stored:
            stored[first] = key
            plan.fill(place, value)
        elif stored[first] != key:
            plan.mismatched.append(f"{key_of(place)} is tied to {first} here but not in the checkpoint")
    # A tied tensor is there if it is there under one of its names.
    plan.missing.extend(key_of(place) for place in absent if names.first(place) not in stored)
    leftover = [(*path, fqn) for fqn in saved if fqn not in state_dict]
    plan.leftover.extend(leftover)
    plan.unexpected.extend(map(key_of, leftover))


def _plan_object(plan: Plan, entry: Entry, names: ParameterNames) -> None:
    from nucleate.checkpoint.dcp import is_sharded

    # What it holds now says which of its tensors are sharded, and how; their values do not matter.
    current: dict[KeyPath, Tensor] = {}
    split(entry.value.state_dict(), entry.path, current)

    def target(place: KeyPath, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        have = current.get(place)
        if have is not None and is_sharded(have) and have.shape == shape:
            return torch.zeros_like(have, dtype=dtype)
        return torch.zeros(shape, dtype=dtype)

    tree = plan.tree(entry.path, target)
    plan.finish.append((entry.key, lambda: entry.value.load_state_dict(tree)))


def _plan_tensor(plan: Plan, entry: Entry, names: ParameterNames) -> None:
    check_tensor(entry.value, entry.key)
    if entry.path in plan.index.keys:
        plan.fill(entry.path, entry.value)
    else:
        plan.mismatched.append(f"{entry.key} is a tensor here but not in the checkpoint")


def _plan_value(plan: Plan, entry: Entry, names: ParameterNames) -> None:
    value = plan.tree(entry.path)
    plan.finish.append((entry.key, lambda: entry.holder.__setitem__(entry.path[-1], value)))


_PLANNERS = {
    Kind.OPTIMIZER: plan_optimizer,
    Kind.OBJECT: _plan_object,
    Kind.TENSOR: _plan_tensor,
    Kind.VALUE: _plan_value,
}


def _remainder(plan: Plan, entries: list[Entry]) -> dict[str, Any]:
    """Return what no entry takes, with tensors that are filled when the plan is executed."""
    taken = {entry.path for entry in entries}
    looked_into = {path[:depth] for path in taken for depth in range(len(path))}
    found: dict[str, Any] = {}

    def visit(node: dict[str, Any], path: KeyPath) -> None:
        for name, item in node.items():
            place = (*path, name)
            if place in looked_into and isinstance(item, dict):
                visit(item, place)
            elif place not in taken:
                put(place)

    def put(place: KeyPath) -> None:
        holder = found
        for part in place[:-1]:
            holder = holder.setdefault(part, {})
        holder[place[-1]] = plan.tree(place)

    visit(plan.index.skeleton, ())
    for place in plan.leftover:
        put(place)
    return found
