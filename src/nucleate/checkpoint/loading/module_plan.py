"""A module's part of a load: its tensors by name, and the tensors that its own code makes from the stored ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from nucleate.checkpoint.loading.load_plan import LoadPlan
from nucleate.checkpoint.loading.own_ways import Outcome, Replaced, has_own_ways, run_own_ways, run_post_hooks
from nucleate.checkpoint.loading.shell_keys import plain_versions
from nucleate.checkpoint.loading.stored_form import StoredForm
from nucleate.checkpoint.state.entries import ParameterNames
from nucleate.checkpoint.state.tree import KeyPath, check_loadable, key_of
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.deferred import ElementSource, record_of
from nucleate.errors import CheckpointError, ConversionError
from nucleate.layout import local_of
from nucleate.shells import without_shells

#: Brings a module into the form of its stored tensors, which are given by the module's own names.
Prepare = Callable[[nn.Module, Mapping[str, ElementSource]], None]


def plan_module(
    plan: LoadPlan,
    module: nn.Module,
    state_dict: Mapping[str, Any],
    path: KeyPath,
    stored: Mapping[str, str],
    place: KeyPath | None,
    names: ParameterNames,
    ties: Ties,
) -> dict[str, str]:
    """Add the reading of a module to a plan: straight into its parameters and buffers.

    The plan reads the rest of the state dict, such as `get_extra_state()`, whole, and hands it to the module at the
    end.

    Args:
        plan: Receives the reads and the misfits.
        module: The module.
        state_dict: The module's own state dict, `keep_vars=True`, with plain keys.
        path: The module's place in the state, for messages.
        stored: Names for the module to keys of the checkpoint.
        place: The place of the module's values in the checkpoint, if it is known.
        names: The names of the module's tensors. A tied tensor has several.
        ties: The tensors that the plan already reads, by name.

    Returns:
        `stored` with the names that the module's own code made.

    Raises:
        CheckpointError: The module refuses the stored tensors, or its own code cannot be planned.
    """
    with without_shells(module) as module:
        versions = _versions(plan, module, place)
        whole_state = state_dict
        is_deferred = any(record_of(value) is not None for value in (*module.parameters(), *module.buffers()))
        forms = {
            name: part for name, part in module.named_modules(remove_duplicate=False) if isinstance(part, StoredForm)
        }
        optional = _optional(module, versions)
        outcome: Outcome | None = None
        if has_own_ways(module) or _has_copies(module, state_dict, forms):
            stored, outcome = _in_own_way(plan, module, state_dict, stored, versions)
            optional = {fqn for fqn in state_dict if fqn not in outcome.missing and not _is_extra(fqn)}
        absent: list[tuple[KeyPath, Tensor | None]] = []
        for part in dict.fromkeys(forms.values()):
            prefixes = [f"{name}." if name else "" for name, other in forms.items() if other is part]
            stored = _plan_form(plan, part, stored, path, prefixes, names, ties, absent)
            state_dict = {fqn: value for fqn, value in state_dict.items() if not fqn.startswith(tuple(prefixes))}
        own = {**_own(module, state_dict), **(outcome.targets if outcome is not None else {})}
        handed: dict[str, Any] = {}
        for fqn, value in state_dict.items():
            if fqn in own or (outcome is not None and fqn in optional):
                continue
            key = stored.get(fqn) if isinstance(value, Tensor) else None
            name = key_of((*path, fqn))
            if key is not None:
                read = plan.whole(name, plan.tensors[key], None if _is_extra(fqn) else value)
                if read is not None:
                    handed[fqn] = read
            elif place is not None and plan.contents.has((*place, fqn)):
                handed[fqn] = plan.tree((*place, fqn))
            else:
                plan.miss(name, value if isinstance(value, Tensor) else None)
        own = {fqn: value for fqn, value in own.items() if fqn in stored or fqn not in optional}
        _plan_tensors(plan, stored, own, path, names, ties, absent)
        if is_deferred or outcome is not None:
            replaced = [
                (one, plan.whole(one.stored.key, one.stored, None)) for one in (outcome.replaced if outcome else ())
            ]
            missing = outcome.missing if outcome is not None else ()
            # Also with nothing to do: ranks where the module is real have something to do, and all must keep in step.
            plan.finish.append((key_of(path), partial(_finish, module, handed, replaced, missing)))
        else:
            # The module's tensors are filled already, and copying each to itself does nothing; but forms compute from
            # them. The versions are the present ones, because `filled` has the present names.
            filled: Any = OrderedDict({**whole_state, **handed})
            filled._metadata = getattr(whole_state, "_metadata", None)
            plan.finish.append((key_of(path), partial(_load_filled, module, filled, forms)))
        return dict(stored)


def _plan_form(
    plan: LoadPlan,
    part: StoredForm,
    stored: Mapping[str, str],
    path: KeyPath,
    prefixes: list[str],
    names: ParameterNames,
    ties: Ties,
    absent: list[tuple[KeyPath, Tensor | None]],
) -> dict[str, str]:
    """Add the reading of a `StoredForm`, and return the names that it does not use.

    Args:
        plan: Receives the reads and the misfits.
        part: The module that chooses its stored tensors itself.
        stored: Names for the whole module to keys of the checkpoint.
        path: The whole module's place in the state.
        prefixes: The beginnings of the names of `part`: several if it stands in several places.
        names: The names of the whole module's tensors.
        ties: The tensors that the plan already reads, by name.
        absent: Receives the places of tensors that are not stored. A tie may still give such a tensor its value.
    """
    tensors = plan.tensors
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in stored)), prefixes[0])
    mine = {name[len(prefix) :]: tensors[key] for name, key in stored.items() if name.startswith(prefix)}
    assert isinstance(part, nn.Module)
    where = key_of((*path, *filter(None, (prefix.removesuffix("."),)))) or type(part).__name__
    try:
        taken = part.bind_stored(mine)
    except (CheckpointError, ConversionError) as error:
        plan.unfit.append(f"{where}: {error}")
        return {name: key for name, key in stored.items() if not name.startswith(tuple(prefixes))}
    for name, given in taken.given.items():
        target, place = getattr(part, name), (*path, f"{prefix}{name}")
        check_loadable(target, key_of(place))
        assert given.shape == tuple(target.shape)
        if given is mine.get(name):
            # The stored tensor itself: `target` may be tied to a tensor of another module.
            ties.add(plan, place, names.first(place), mine[name], target)
        else:
            plan.add(key_of(place), given, target, where)
    for name in taken.missing:
        absent.append(((*path, f"{prefix}{name}"), None))
    left, used = dict(stored), taken.used & mine.keys()
    for name in used:
        ties.took(key_of((*path, f"{prefix}{name}")), mine[name])
        del left[f"{prefix}{name}"]
    for other in prefixes:
        for name in used:
            key = left.pop(f"{other}{name}", None)
            if key is not None:
                first = key_of((*path, f"{prefix}{name}"))
                ties.same(plan, (*path, f"{other}{name}"), first, tensors[key])
    return left


def _load_filled(module: nn.Module, filled: Any, forms: Mapping[str, StoredForm]) -> None:
    for name, part in forms.items():
        # The values that the form computes from its tensors have changed with them.
        assert isinstance(part, nn.Module)
        part.state_dict(destination=filled, prefix=f"{name}." if name else "", keep_vars=True)
    with without_shells(module) as plain:
        plain.load_state_dict(filled)


def _versions(plan: LoadPlan, module: nn.Module, place: KeyPath | None) -> Mapping[str, int]:
    """Return the saved versions of a module and its submodules."""
    if plan.contents.is_complete:
        # Such contents have no versions: the present ones stand for those at the time of the save.
        return {name: part._version for name, part in module.named_modules()}
    saved = plan.contents.versions.get(place, {}) if place is not None else {}
    return plain_versions(saved, {name for name, _ in module.named_modules()})


def _optional(module: nn.Module, versions: Mapping[str, int]) -> set[str]:
    """Return the keys that torch does not miss in old checkpoints: the counters of batch norms."""
    # `_NormBase._load_from_state_dict` (torch/nn/modules/batchnorm.py, 2.13).
    return {
        f"{name}.num_batches_tracked" if name else "num_batches_tracked"
        for name, part in module.named_modules()
        if isinstance(part, _NormBase) and versions.get(name, 0) < 2
    }


def _own(module: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state dict that lie in the module's memory. The others are copies or new tensors."""
    inside = {_memory(tensor) for tensor in (*module.parameters(), *module.buffers())}
    return {fqn: t for fqn, t in state_dict.items() if isinstance(t, Tensor) and _memory(t) in inside}


def _memory(tensor: Any) -> int:
    with torch._C.DisableTorchFunction():
        try:
            return int(local_of(tensor).untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):
            return id(tensor)  # a subclass without memory


def _is_extra(fqn: str) -> bool:
    return fqn.rpartition(".")[2] == _EXTRA_STATE_KEY_SUFFIX


def _in_own_way(
    plan: LoadPlan,
    module: nn.Module,
    state_dict: Mapping[str, Any],
    stored: Mapping[str, str],
    versions: Mapping[str, int],
) -> tuple[dict[str, str], Outcome]:
    """Run a module's own code on the stored tensors.

    Returns:
        Names for the module to keys of the plan's tensors; and the effect of the code.
    """
    keys = {id(plan.tensors[key]): key for key in stored.values()}
    given = {name: plan.tensors[key] for name, key in stored.items()}
    outcome = run_own_ways(module, state_dict, given, versions, str(plan.contents.path))
    names = {name: key for name, key in stored.items() if _is_extra(name)}
    for name, tensor in outcome.tensors.items():
        key = keys.get(id(tensor))
        if key is None:
            key = f"{name} (computed by {type(module).__name__})"
            plan.tensors[key] = tensor
        names[name] = key
    return names, outcome


def _finish(
    module: nn.Module,
    extra_states: Mapping[str, Any],
    replaced: Iterable[tuple[Replaced, Tensor | None]],
    missing: Iterable[str],
) -> None:
    for one, value in replaced:
        if value is not None:
            one.put(value)
    with without_shells(module) as plain:
        for fqn, value in extra_states.items():
            plain.get_submodule(fqn.rpartition(".")[0]).set_extra_state(value)
        run_post_hooks(plain, missing)


def _has_copies(module: nn.Module, state_dict: Mapping[str, Any], forms: Iterable[str]) -> bool:
    """Return whether a state dict holds copies. Only the module knows then where the loaded tensors go."""
    own, inside_forms = _own(module, state_dict), tuple(f"{name}." if name else "" for name in forms)
    others = (fqn for fqn, value in state_dict.items() if isinstance(value, Tensor) and fqn not in own)
    return any(not _is_extra(fqn) and not fqn.startswith(inside_forms) for fqn in others)


def _plan_tensors(
    plan: LoadPlan,
    stored: Mapping[str, str],
    own: Mapping[str, Tensor],
    path: KeyPath,
    names: ParameterNames,
    ties: Ties,
    absent: list[tuple[KeyPath, Tensor | None]],
) -> None:
    for fqn, value in own.items():
        place = (*path, fqn)
        check_loadable(value, key_of(place))
        key = stored.get(fqn)
        if key is None:
            absent.append((place, value))
        else:
            ties.add(plan, place, names.first(place), plan.tensors[key], value)
    for place, tensor in absent:
        first = ties.loaded(names.first(place))
        if first is None:
            plan.miss(key_of(place), tensor)
        else:
            # A checkpoint has a tied tensor if it has it under one of its names.
            plan.tie(key_of(place), *first)


class Ties:
    """The tensors that a plan already reads, by name: a load reads a tied tensor once.

    Args:
        compares: Whether this rank compares tensors that a checkpoint holds twice; one rank is enough.
    """

    def __init__(self, compares: bool) -> None:
        self._read: dict[str, tuple[str, StoredTensor]] = {}
        self._compares = compares

    def add(self, plan: LoadPlan, place: KeyPath, shared: str, stored: StoredTensor, tensor: Tensor) -> None:
        """Read a tensor, or make sure that another name of the tensor is read with the same values.

        Args:
            plan: Receives the read or the misfit.
            place: The tensor's place in the state.
            shared: The name that all tensors of the tie share.
            stored: The tensor in the checkpoint.
            tensor: The tensor of the model.
        """
        name, first = key_of(place), self._read.get(shared)
        if first is None:
            self._read[shared] = (name, stored)
            plan.fill(name, stored, tensor)
        else:
            self.same(plan, place, shared, stored)

    def same(self, plan: LoadPlan, place: KeyPath, shared: str, stored: StoredTensor) -> None:
        """Make sure that the tensor that is read under another name has the values of a stored tensor.

        Args:
            plan: Receives the tie or the misfit.
            place: The place of the tensor in the state.
            shared: The name that all tensors of the tie share.
            stored: The tensor in the checkpoint.
        """
        name, first = key_of(place), self._read[shared]
        if stored.is_same(first[1]) or not self._compares or has_same_values(stored, first[1]):
            plan.tie(name, first[0], stored)
        else:
            plan.unfit.append(
                f"{name} is tied to {first[0]} here but not in the checkpoint, which holds different values for them"
            )

    def took(self, name: str, stored: StoredTensor) -> None:
        """Note that a module has taken the tensor that is stored under a name."""
        self._read.setdefault(name, (name, stored))

    def loaded(self, shared: str) -> tuple[str, StoredTensor] | None:
        """Return the name that a tensor is read under and its stored tensor, or None."""
        return self._read.get(shared)


def has_same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether two stored tensors hold the same bytes. They are read a part at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    step = 1 << 20
    for start in range(0, one.numel, step):
        count = min(step, one.numel - start)
        left, right = (torch.empty(count, dtype=one.dtype, device="cpu") for _ in range(2))
        one.read(start, left)
        other.read(start, right)
        if not torch.equal(left.view(torch.uint8), right.view(torch.uint8)):
            return False
    return True
