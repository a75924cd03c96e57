"""The function `load`: it compares a checkpoint with a state, and then loads the checkpoint into the state.

This file decides which part of a checkpoint each kind of entry takes, and the order of the steps on the ranks.
`load_plan` decides which tensors fit.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nucleate.checkpoint.loading.load_plan import LoadPlan
from nucleate.checkpoint.loading.module_plan import Prepare, Ties, plan_module
from nucleate.checkpoint.loading.optimizer_plan import plan_optimizer
from nucleate.checkpoint.loading.report import Finding, LoadReport
from nucleate.checkpoint.loading.shell_keys import plain_stored
from nucleate.checkpoint.readers import Reader, agree_on_save, open_saved
from nucleate.checkpoint.state.entries import Entry, Kind, ParameterNames, agree, entries_of
from nucleate.checkpoint.state.tree import KeyPath, check_tensor, key_of, split
from nucleate.deferred import outside_inference_mode
from nucleate.layout import is_sharded
from nucleate.shells import state_dict as plain_state_dict

if TYPE_CHECKING:
    from nucleate.cluster.communicator import Communicator


@outside_inference_mode()
def load(  # noqa: PLR0913 - one call takes every option of a load
    path: str | os.PathLike[str],
    state: Any,
    communicator: Communicator,
    strict: bool = True,
    *,
    remainder: bool = True,
    reader: str | Reader | None = None,
    readers: Sequence[Reader] = (),
    trusted: bool = False,
    prepare: Prepare | None = None,
) -> LoadReport:
    """Load the checkpoint at `path` into `state`, and return a report.

    Real modules and tensors are filled in place. Deferred ones are bound to the files. Optimizers and objects are
    loaded through their `load_state_dict`. Plain values are replaced in the dict that holds them. A rank reads only its
    own shards of sharded tensors. Everything is compared before anything changes. So only a disk that fails while
    tensors are read can leave the state partly loaded.

    Args:
        path: The path that was given to `save`, or any other checkpoint; rank 0's path counts.
        state: The state to load into, as it was given to `save`, or a part of that state. None reads everything into
            the report.
        communicator: The ranks that load together.
        strict: Refuse keys that are missing, unexpected or of another shape or dtype, in the entries of `state`.
            Otherwise tensors that are missing or do not fit stay as they are (or are made by their recipes), with a
            warning, and unexpected keys go to the report.
        remainder: Read everything that `state` does not contain, whole, on every rank. False saves that memory.
        reader: The format's name, if the files do not show it.
        readers: Readers of further formats. They are asked first, and `reader` takes their names.
        trusted: Let the files run code that they choose; see `Reader.trusting`.
        prepare: Called with each module and its stored tensors, by the module's own names, before they are compared.

    Returns:
        The report: the loaded keys, the missing keys and so on. As a dict, it holds the part of the checkpoint that
        `state` does not contain, with tensors on the CPU. The dict is empty with `remainder=False`.

    Raises:
        CheckpointNotFoundError: There is no checkpoint at `path`.
        CheckpointKeyError: Keys are missing or unexpected.
        ShapeMismatchError: Tensors have other shapes.
        CheckpointError: The checkpoint is damaged, something in it is of another kind, or reading failed.
        UsageError: A tensor has neither memory nor a recipe, or an optimizer's parameters are deferred or in no module
            of the state.
        ConfigurationError: The state is not a dict, or has keys that are not strings.
        RankDisagreementError: The ranks' states differ.
        RankFailedError: One of these errors happened on another rank.
    """
    agreed = agree_on_save(path, communicator)
    loading = f"loading the checkpoint {agreed.path}"
    with communicator.all_or_none(loading):
        contents = open_saved(agreed, reader, readers, trusted, passes_over=True)
    plan = LoadPlan(contents)
    with plan.closed_after_error():
        with communicator.all_or_none(loading):
            contents.check_named()
            entries = list(entries_of({} if state is None else state))
            wanted = {entry.path for entry in entries}
            # What nobody asks for is neither made nor refused.
            plan.take(
                contents.made(
                    lambda place: remainder or any(place[:depth] in wanted for depth in range(len(place) + 1))
                )
            )
        _load(plan, entries, communicator, loading, strict=strict, remainder=remainder, prepare=prepare)
    # The warning comes last: if warnings are errors, it must not leave the other ranks waiting.
    if plan.summary and communicator.rank == 0:
        warnings.warn(f"{loading}: {plan.summary}", stacklevel=3)
    return plan.report


def _load(
    plan: LoadPlan,
    entries: list[Entry],
    communicator: Communicator,
    loading: str,
    *,
    strict: bool,
    remainder: bool,
    prepare: Prepare | None,
) -> None:
    """Load a checkpoint that is open; see `load`."""
    agree(entries, communicator)
    modules: dict[KeyPath, tuple[Any, Any]] = {}
    names = ParameterNames({})
    for entry in sorted(entries, key=lambda entry: entry.kind is not Kind.MODULE):
        with communicator.all_or_none(f"{loading}: {entry.key}"):
            if entry.kind is Kind.MODULE:
                if prepare is not None:
                    stored = plain_stored(_stored(plan, entry.path), entry.value)
                    prepare(entry.value, {name: plan.contents.tensors[key] for name, key in stored.items()})
                modules[entry.path] = (entry.value, plain_state_dict(entry.value, keep_vars=True))
                names = ParameterNames(modules)
            elif plan.contents.has(entry.path):
                _PLANNERS[entry.kind](plan, entry, names)
            else:
                plan.miss(entry.key)
    with communicator.all_or_none(loading):
        ties = Ties(compares=communicator.rank == 0)
        for place, (module, state_dict) in modules.items():
            if plan.contents.has(place):
                _plan_module(plan, place, module, state_dict, names, ties)
            else:
                plan.miss(key_of(place) or "the module")
        plan.check(strict)
        if remainder:
            plan.report.update(_remainder(plan, entries))
    with communicator.all_or_none(loading):
        plan.execute()
    order = {entry.key: place for place, entry in enumerate(entries)}
    for key, finish in sorted(plan.finish, key=lambda item: order[item[0]]):
        with communicator.all_or_none(f"{loading}: {key}"):
            finish()


def _plan_module(
    plan: LoadPlan, path: KeyPath, module: Any, state_dict: Any, names: ParameterNames, ties: Ties
) -> None:
    """Add a module to `plan`, which reads directly into the module's parameters.

    Args:
        plan: The plan; it receives the tensors to read and those that do not fit.
        path: The module's place in the state.
        module: The module.
        state_dict: The module's `state_dict`.
        names: The keys of the parameters of all modules.
        ties: The tensors that are read already, for tied tensors.
    """
    saved = plan.contents.at(path)
    if not isinstance(saved, dict):
        plan.unfit.append(f"{key_of(path)} is a module here but not in the checkpoint")
        return
    stored = plain_stored(_stored(plan, path), module)
    used = plan_module(plan, module, state_dict, path, stored, path, names, ties)
    wanted = {used[fqn] for fqn in used if fqn in state_dict}
    for fqn in saved:
        key = plan.contents.keys.get((*path, fqn))
        if fqn not in state_dict and (key is None or (key not in wanted and key in used.values())):
            size_bytes = plan.tensors[key].size_bytes if key is not None else 0
            plan.leftover.append((*path, fqn))
            plan.report.unexpected.append(Finding(key_of((*path, fqn)), size_bytes))


def _stored(plan: LoadPlan, path: KeyPath) -> dict[str, str]:
    """Return the key in the checkpoint for each name of a module's stored tensors."""
    saved = plan.contents.at(path) if plan.contents.has(path) else None
    if not isinstance(saved, dict):
        return {}
    return {fqn: plan.contents.keys[(*path, fqn)] for fqn in saved if (*path, fqn) in plan.contents.keys}


def _plan_object(plan: LoadPlan, entry: Entry, names: ParameterNames) -> None:
    # The object's current state tells which of its tensors are sharded, and how. Their values do not matter.
    current: dict[KeyPath, Tensor] = {}
    split(entry.value.state_dict(), entry.path, current)

    def target(place: KeyPath, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        have = current.get(place)
        if have is not None and is_sharded(have) and have.shape == shape:
            return torch.empty_like(have, dtype=dtype)
        return torch.empty(shape, dtype=dtype, device="cpu")

    tree = plan.tree(entry.path, target)
    plan.finish.append((entry.key, lambda: entry.value.load_state_dict(tree)))


def _plan_tensor(plan: LoadPlan, entry: Entry, names: ParameterNames) -> None:
    check_tensor(entry.value, entry.key)
    if entry.path in plan.contents.keys:
        plan.fill(entry.key, plan.contents.tensors[plan.contents.keys[entry.path]], entry.value)
    else:
        plan.unfit.append(f"{entry.key} is a tensor here but not in the checkpoint")


def _plan_value(plan: LoadPlan, entry: Entry, names: ParameterNames) -> None:
    value = plan.tree(entry.path)
    plan.finish.append((entry.key, lambda: entry.holder.__setitem__(entry.path[-1], value)))


_PLANNERS = {
    Kind.OPTIMIZER: plan_optimizer,
    Kind.OBJECT: _plan_object,
    Kind.TENSOR: _plan_tensor,
    Kind.VALUE: _plan_value,
}


def _remainder(plan: LoadPlan, entries: list[Entry]) -> dict[str, Any]:
    """Return the part of the checkpoint that no entry takes. Executing the plan fills its tensors."""
    taken = {entry.path for entry in entries}
    looked_into = {path[:depth] for path in taken for depth in range(len(path))}
    found: dict[str, Any] = {}
    for place in (*_places(plan.contents.skeleton, (), taken, looked_into), *plan.leftover):
        holder = found
        for part in place[:-1]:
            holder = holder.setdefault(part, {})
        holder[place[-1]] = plan.tree(place)
    return found


# Not a function inside of `_remainder`: one that calls itself would keep the plan and its files until the next garbage
# collection.
def _places(
    node: dict[str, Any], path: KeyPath, taken: Collection[KeyPath], looked_into: Collection[KeyPath]
) -> Iterator[KeyPath]:
    """Yield the places under `path` that no entry takes."""
    for name, item in node.items():
        place = (*path, name)
        if place in looked_into and isinstance(item, dict):
            yield from _places(item, place, taken, looked_into)
        elif place not in taken:
            yield place
