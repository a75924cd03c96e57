"""The function `load_raw`: it loads the weights of any checkpoint into one model.

`load` reads a whole training state that `save` wrote. `load_raw` reads weights that others wrote: a model's tensors by
name, in any format. The tensors may have other names, or be a part of a larger checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nucleate.checkpoint.loading.adapter_keys import refuse_adapter
from nucleate.checkpoint.loading.load_plan import LoadPlan
from nucleate.checkpoint.loading.module_plan import Prepare, Ties, plan_module
from nucleate.checkpoint.loading.raw_optimizer import load_raw_optimizer
from nucleate.checkpoint.loading.report import Finding, LoadReport
from nucleate.checkpoint.loading.shell_keys import plain_stored
from nucleate.checkpoint.loading.tensor_map import map_tensors
from nucleate.checkpoint.readers import Reader, agree_on_save, open_saved
from nucleate.checkpoint.rules.key_map import KeyMap
from nucleate.checkpoint.state.entries import ParameterNames
from nucleate.checkpoint.state.tree import KeyPath, key_of
from nucleate.checkpoint.stored.contents import Contents
from nucleate.deferred import outside_inference_mode
from nucleate.errors import CheckpointKeyError, CheckpointNotFoundError, ConfigurationError, UsageError, name_list
from nucleate.shells import state_dict as plain_state_dict

if TYPE_CHECKING:
    from nucleate.cluster.communicator import Communicator


@outside_inference_mode()
def load_raw(  # noqa: PLR0913 - one call takes every option of a load
    path: str | os.PathLike[str],
    model: nn.Module | Optimizer,
    communicator: Communicator,
    strict: bool = True,
    *,
    prefix: str = "",
    keys: KeyMap | None = None,
    reader: str | Reader | None = None,
    readers: Sequence[Reader] = (),
    mmap: bool = False,
    trusted: bool = False,
    prepare: Prepare | None = None,
) -> LoadReport:
    """Load a model's tensors from a checkpoint of any format.

    A deferred model is bound to the files: nothing is read before `setup`, which reads only this rank's shard of each
    tensor. A model that is set up, or was never deferred, is filled in place.

    Args:
        path: A file or folder; rank 0's path counts.
        model: The model. Or an optimizer, for files that hold its `state_dict()`.
        communicator: The ranks that load together.
        strict: Refuse keys that are missing, unexpected or of another shape or dtype. Otherwise tensors that are
            missing or do not fit are made by their recipes, or stay as they are, with a warning.
        prefix: Load only the keys that begin with this text, and remove it from the keys. An example is `"model."` in a
            training checkpoint. A prefix that all keys have, and that the model's names lack, is found by itself.
        keys: Other names for the keys, after `prefix`: a dict of regular expressions and replacements, a function, a
            rule such as `rename`, `concatenate` or `transpose`, or a list of these.
        reader: The format's name, if the files do not show it.
        readers: Readers of further formats. They are asked first, and `reader` takes their names.
        mmap: Map deferred tensors on the CPU to the file's own pages, if they have the file's dtype and layout. They
            are ready at once, and take no memory of their own until they are written. The file must not be changed
            meanwhile.
        trusted: Let the files run code that they choose; see `Reader.trusting`.
        prepare: Called with the model and its stored tensors, by the model's names, before they are compared.

    Returns:
        The report: the loaded, missing, unexpected, mismatched, cast and tied keys.

    Raises:
        CheckpointNotFoundError: There is nothing at `path`, or nothing under `prefix`.
        CheckpointKeyError: Keys are missing or unexpected, or get the same name.
        ShapeMismatchError: Tensors have other shapes.
        CheckpointError: The checkpoint is damaged, or reading failed.
        UsageError: `model` is not a module, or one of its tensors has neither memory nor a recipe.
        RankFailedError: One of these errors happened on another rank.
    """
    agreed = agree_on_save(path, communicator)
    loading = f"loading {agreed.path}"
    with communicator.all_or_none(loading):
        if not isinstance(model, (nn.Module, Optimizer)):
            raise UsageError(
                f"load_raw takes a path and then a torch.nn.Module or an optimizer, not {type(model).__name__}. For "
                "other state use `load`."
            )
        if isinstance(model, Optimizer) and (keys is not None or mmap):
            raise ConfigurationError("keys= and mmap= are for models; an optimizer's state is loaded as it is.")
        contents = open_saved(agreed, reader, readers, trusted, passes_over=True)
    plan = LoadPlan(contents, maps=mmap)
    with plan.closed_after_error():
        if isinstance(model, Optimizer):
            load_raw_optimizer(plan, model, communicator, strict, prefix, loading)
        else:
            _load_model(plan, model, communicator, loading, strict=strict, prefix=prefix, keys=keys, prepare=prepare)
    # The warning comes last: if warnings are errors, it must not leave the other ranks waiting.
    if plan.summary and communicator.rank == 0:
        warnings.warn(f"{loading}: {plan.summary}", stacklevel=3)
    return plan.report


def _load_model(
    plan: LoadPlan,
    model: nn.Module,
    communicator: Communicator,
    loading: str,
    *,
    strict: bool,
    prefix: str,
    keys: KeyMap | None,
    prepare: Prepare | None,
) -> None:
    """Load a model from a checkpoint that is open; see `load_raw`."""
    with communicator.all_or_none(loading):
        contents = plan.contents
        contents.check_named()
        prefix = prefix or _only_module(contents)
        if prefix:
            contents = contents.made(partial(_is_under, prefix))
        if keys is None and (more := _prefix_of_all(plain_stored(_stored(contents, prefix, None)[1], model), model)):
            prefix += more
            contents = contents.made(partial(_is_under, prefix))
        contents, stored = _stored(contents, prefix, keys)
        stored = plain_stored(stored, model)
        plan.report.prefix = prefix
        if contents.objects and not prefix:
            # A missing prefix is the likelier mistake, and with the prefix the objects do not matter.
            if strict:
                _suggest(contents, stored, plain_state_dict(model, keep_vars=True))
            contents = contents.made()
        refuse_adapter(contents.path, stored, plain_state_dict(model, keep_vars=True))
        plan.take(contents)
        if prepare is not None:
            prepare(model, {name: plan.tensors[key] for name, key in stored.items()})
        state_dict: dict[str, Any] = plain_state_dict(model, keep_vars=True)
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
            _suggest(plan.contents, stored, state_dict)
        plan.check(strict)
    with communicator.all_or_none(loading):
        plan.execute()
    for _, finish in plan.finish:
        with communicator.all_or_none(loading):
            finish()


def _only_module(contents: Contents) -> str:
    """Return the prefix of the only module in a checkpoint that `save` wrote, or an empty one for other checkpoints."""
    if not contents.modules or () in contents.modules:
        return ""
    places = [f"{key_of(place)}." for place in contents.modules]
    if len(places) != 1:
        raise CheckpointKeyError(
            f"{contents.path} holds {len(places)} models: {name_list(map(repr, places))}. Choose one with `prefix`."
        )
    return places[0]


def _place(contents: Contents, prefix: str) -> KeyPath | None:
    """Return the place in the skeleton where all keys with a prefix stand, or None if there is no such place."""
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
    """Return whether a key belongs to a value of the module that is not a tensor, such as a dict with tensors."""
    if place is None:
        return False
    return any(
        name.startswith(f"{fqn}.") and not isinstance(value, Tensor) and contents.has((*place, fqn))
        for fqn, value in state_dict.items()
    )


def _stored(contents: Contents, prefix: str, keys: KeyMap | None) -> tuple[Contents, dict[str, str]]:
    """Return the contents with the tensors that rules make, and the key for each name that a model may ask for."""
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
        # A tensor that a rule makes may have the name of a tensor in the file.
        key = known.setdefault(id(tensor), f"{name} of {tensor.origin}")
        tensors[key] = tensor
        stored[name] = key
    return dataclasses.replace(contents, tensors=tensors), stored


def _is_under(prefix: str, place: KeyPath) -> bool:
    """Return whether the value at a place has the prefix, or holds everything that has it."""
    name = key_of(place)
    return name.startswith(prefix) or prefix.startswith(f"{name}.")


def _prefix_of_all(stored: dict[str, str], model: nn.Module) -> str:
    """Return the prefix that all stored names have and the model's names do not, such as `model.`; or an empty one."""
    wanted = [name for name, value in plain_state_dict(model, keep_vars=True).items() if isinstance(value, Tensor)]
    if not wanted or any(name in stored for name in wanted):
        return ""
    prefixes = [name[: -len(wanted[0])] for name in stored if name.endswith(f".{wanted[0]}")]
    for prefix in prefixes:
        if all(name.startswith(prefix) for name in stored) and all(prefix + name in stored for name in wanted):
            return prefix
    return ""


def _suggest(contents: Contents, stored: dict[str, str], state_dict: dict[str, Any]) -> None:
    """Raise an error that names the prefix, if nothing fits only because all keys have one more prefix."""
    wanted = [name for name, value in state_dict.items() if isinstance(value, Tensor)]
    if not wanted or any(name in stored for name in wanted):
        return
    for name in stored:
        if name.endswith(f".{wanted[0]}"):
            prefix = name[: -len(wanted[0])]
            if all(prefix + other in stored for other in wanted):
                raise CheckpointKeyError(
                    f"{contents.path} holds none of the model's keys, but all of them are there behind "
                    f"{prefix!r}. Pass prefix={prefix!r}."
                )
