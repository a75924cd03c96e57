"""Loads the weights of any checkpoint into one model: `load_raw`.

Where `load` reads back what `save` wrote of a whole training state, this reads what others wrote: a model's tensors by
name, in any format, under other names if need be, from inside of something larger if need be.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nucleate.checkpoint.disk.series import resolve
from nucleate.checkpoint.loading.load_plan import Plan
from nucleate.checkpoint.loading.module_plan import Prepare, Ties, plan_module
from nucleate.checkpoint.loading.report import Finding, LoadReport
from nucleate.checkpoint.loading.tensor_map import map_tensors
from nucleate.checkpoint.readers import open_checkpoint
from nucleate.checkpoint.rules.key_map import KeyMap
from nucleate.checkpoint.state.entries import ParameterNames
from nucleate.checkpoint.state.tree import KeyPath, key_of
from nucleate.checkpoint.stored.contents import Contents
from nucleate.errors import CheckpointKeyError, CheckpointNotFoundError, UsageError, name_list

if TYPE_CHECKING:
    from nucleate.cluster.communicator import Communicator


def load_raw(  # noqa: PLR0913 - one call says all there is to say of a load
    path: str | os.PathLike[str],
    model: nn.Module,
    communicator: Communicator,
    strict: bool = True,
    *,
    prefix: str = "",
    keys: KeyMap | None = None,
    reader: str | None = None,
    mmap: bool = False,
    prepare: Prepare | None = None,
) -> LoadReport:
    """Load a model's tensors from a checkpoint of any format.

    A deferred model is bound to the files: nothing is read before `setup`, which reads, of each tensor, what this rank
    owns of it. A model that is set up, or was never deferred, is filled in place.

    Args:
        path: A file or folder; rank 0's path counts.
        model: The model.
        communicator: The ranks that load together.
        strict: Refuse keys that are missing, unexpected or of another shape or dtype. Otherwise what is missing or does
            not fit is made by its recipe, or stays as it is, with a warning.
        prefix: Only the keys that begin with this, without it: `"model."` of a training checkpoint.
        keys: Other names for the keys, after `prefix`: a dict of regular expressions and replacements, a function, a
            rule such as `rename`, `concatenate` or `transpose`, or a list of these.
        reader: The format's name, where it cannot be told from the files.
        mmap: Let deferred tensors on the CPU lie in the file's own pages where dtype and layout are the file's: ready
            at once, without memory of their own until they are written. The file must not be changed meanwhile.
        prepare: Called with the model and what is stored for it, by its names, before the two are compared.

    Returns:
        What was loaded, missing, unexpected, mismatched, cast and tied.

    Raises:
        CheckpointNotFoundError: There is nothing at `path`, or nothing under `prefix`.
        CheckpointKeyError: Keys are missing or unexpected, or get the same name.
        ShapeMismatchError: Tensors have other shapes.
        CheckpointError: The checkpoint is damaged, or reading failed.
        UsageError: `model` is no module, or a tensor of it has neither memory nor a recipe.
        RankFailedError: One of these happened on another rank.
    """
    where = communicator.broadcast(os.path.abspath(path))
    loading = f"loading {where}"
    with communicator.all_or_none(loading):
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"load_raw takes a path and then a torch.nn.Module, not {type(model).__name__}. For optimizers and "
                "other state use `load`."
            )
        contents = open_checkpoint(resolve(where), reader)
        prefix = prefix or _only_module(contents)
        contents, stored = _stored(contents, prefix, keys)
        plan = Plan(contents, maps=mmap)
        if prepare is not None:
            prepare(model, {name: plan.tensors[key] for name, key in stored.items()})
        state_dict: dict[str, Any] = model.state_dict(keep_vars=True)
        place = _place(plan.contents, prefix) if keys is None else None
        names = ParameterNames({(): (model, state_dict)})
        ties = Ties(compares=communicator.rank == 0)
        stored = plan_module(plan, model, state_dict, (), stored, place, names, ties)
        for name, key in stored.items():
            if name not in state_dict and not _is_inside(name, state_dict, plan.contents, place):
                unused = plan.tensors[key]
                detail = f"made of {unused.origin}" if unused.origin else ""
                plan.report.unexpected.append(Finding(name, unused.size_bytes, detail))
        if strict:
            _suggest(plan, stored, state_dict)
        plan.check(strict)
    with communicator.all_or_none(loading):
        plan.execute()
    for _, finish in plan.finish:
        with communicator.all_or_none(loading):
            finish()
    # Last: where warnings are errors, this one must not leave the other ranks waiting.
    if plan.summary and communicator.rank == 0:
        warnings.warn(f"{loading}: {plan.summary}", stacklevel=2)
    return plan.report


def _only_module(contents: Contents) -> str:
    """Return the prefix of the one module that a checkpoint of `save` holds."""
    if not contents.modules or () in contents.modules:
        return ""
    places = [f"{key_of(place)}." for place in contents.modules]
    if len(places) != 1:
        raise CheckpointKeyError(
            f"{contents.path} holds {len(places)} models: {name_list(map(repr, places))}. Say which one by `prefix`."
        )
    return places[0]


def _place(contents: Contents, prefix: str) -> KeyPath | None:
    """Return where in the skeleton the keys behind a prefix stand, if they stand together."""
    waiting: list[KeyPath] = [()]
    while waiting:
        place = waiting.pop()
        here = f"{key_of(place)}." if place else ""
        if here == prefix:
            return place
        node = contents.at(place)
        if isinstance(node, dict) and prefix.startswith(here):
            waiting.extend((*place, name) for name in node if isinstance(node[name], dict))
    return None


def _is_inside(name: str, state_dict: dict[str, Any], contents: Contents, place: KeyPath | None) -> bool:
    """Return whether a key belongs to a value of the module that is no tensor, such as a dict with tensors in it."""
    if place is None:
        return False
    return any(
        name.startswith(f"{fqn}.") and not isinstance(value, Tensor) and contents.has((*place, fqn))
        for fqn, value in state_dict.items()
    )


def _stored(contents: Contents, prefix: str, keys: KeyMap | None) -> tuple[Contents, dict[str, str]]:
    """Return the contents with what rules make of them, and the names that a model may ask for, to keys in them."""
    names = {key_of(path): key for path, key in contents.keys.items()}
    if prefix:
        under = {name[len(prefix) :]: key for name, key in names.items() if name.startswith(prefix)}
        if not under:
            first = name_list(list(names)[:5])
            raise CheckpointNotFoundError(
                f"no key of {contents.path} begins with {prefix!r}; there are {len(names)}: {first}, ..."
            )
        names = under
    if keys is None:
        return contents, names
    found = map_tensors({name: contents.tensors[key] for name, key in names.items()}, keys, str(contents.path))
    stored: dict[str, str] = {}
    tensors = dict(contents.tensors)
    known = {id(tensor): key for key, tensor in contents.tensors.items()}
    for name, tensor in found.items():
        # What is made may have the name of something in the file.
        key = known.setdefault(id(tensor), f"{name} of {tensor.origin}")
        tensors[key] = tensor
        stored[name] = key
    return dataclasses.replace(contents, tensors=tensors), stored


def _suggest(plan: Plan, stored: dict[str, str], state_dict: dict[str, Any]) -> None:
    """Where nothing fits because all keys have one prefix more, say so instead of listing them."""
    wanted = [name for name, value in state_dict.items() if isinstance(value, Tensor)]
    if not wanted or any(name in stored for name in wanted):
        return
    for name in stored:
        if name.endswith(f".{wanted[0]}"):
            prefix = name[: -len(wanted[0])]
            if all(prefix + other in stored for other in wanted):
                raise CheckpointKeyError(
                    f"no key of {plan.contents.path} is one of the model's, but all of them are there behind "
                    f"{prefix!r}. Pass prefix={prefix!r}."
                )
