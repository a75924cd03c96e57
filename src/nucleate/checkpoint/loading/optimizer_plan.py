"""The plan of an optimizer's load: names become numbers again, and an optimizer that never stepped gets new tensors.

The plan takes no step of the optimizer to find out the form of these tensors.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nucleate.checkpoint.loading.load_plan import LoadPlan
from nucleate.checkpoint.loading.report import Finding
from nucleate.checkpoint.loading.shell_keys import plain_keys
from nucleate.checkpoint.state.entries import Entry, ParameterNames
from nucleate.checkpoint.state.optimizer_names import FREE, OptimizerNames, check_named
from nucleate.checkpoint.state.tree import KeyPath, has_data, key_of
from nucleate.deferred import record_of
from nucleate.errors import UsageError
from nucleate.layout import is_sharded, zeros_beside


def plan_optimizer(plan: LoadPlan, entry: Entry, names: ParameterNames) -> None:
    """Add the reading of an optimizer's state to `plan`.

    Args:
        plan: Receives the reads, the misfits, and a function to call at the end.
        entry: An optimizer, whose state is in the checkpoint.
        names: The keys of the parameters of the modules that are loaded with the optimizer.

    Raises:
        UsageError: Some parameters of the optimizer are not in these modules, or they are deferred.
    """
    optimizer: Optimizer = entry.value
    own = OptimizerNames(entry, names)
    check_named(entry, own)
    _refuse_deferred(entry)
    saved = plan.contents.at(entry.path)
    if not (isinstance(saved, dict) and {"state", "param_groups"} <= saved.keys()):
        plan.unfit.append(f"{entry.key} is an optimizer here but not in the checkpoint")
        return
    if len(saved["param_groups"]) != len(optimizer.param_groups):
        plan.unfit.append(
            f"{entry.key} has {len(optimizer.param_groups)} parameter groups here but {len(saved['param_groups'])} in "
            "the checkpoint"
        )
        return
    numbered = _Numbered(plan, entry, own, saved)
    if numbered.by_order and any(
        len(theirs["params"]) != len(ours["params"])
        for theirs, ours in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ):
        plan.unfit.append(
            f"{entry.key} knows its parameters by their order in the checkpoint, but has another number of them here"
        )
        return
    for place in range(len(optimizer.param_groups)):
        numbered.add_group(place)
    _fill_free(plan, entry, own, saved, needed=not numbered.by_order)
    others = {
        key: plan.tree((*entry.path, "state", key)) for key in saved["state"] if key not in numbered.saved_keys.values()
    }
    top = {key: plan.tree((*entry.path, key)) for key in saved if key not in ("state", "param_groups", FREE)}

    def finish() -> None:
        optimizer.load_state_dict({**top, "state": {**others, **numbered.state}, "param_groups": numbered.groups})
        for parameter, name, fields in numbered.restored:
            stored = plan.contents.tensors.get(name)
            now = optimizer.state.get(parameter)  # Under ZeRO another rank may have it.
            if now is not None and stored is not None and stored.dtype == parameter.dtype:
                _keep_dtypes(now, fields)

    plan.finish.append((entry.key, finish))


def _fill_free(plan: LoadPlan, entry: Entry, names: OptimizerNames, saved: dict[str, Any], needed: bool) -> None:
    """Add the reading of the parameters that no model has.

    Args:
        plan: Receives the reads and the misfits.
        entry: The optimizer.
        names: The names of its parameters.
        saved: The saved state.
        needed: Whether every such parameter must be there. Other libraries do not save them with the optimizer.
    """
    there = saved.get(FREE) or {}
    for number, parameter in names.free.items():
        place = (*entry.path, FREE, number)
        key = plan.contents.keys.get(place)
        if key is not None:
            plan.fill(key_of(place), plan.contents.tensors[key], parameter)
        elif needed:
            plan.miss(key_of(place), parameter)
    for number in there:
        if number not in names.free:
            place = (*entry.path, FREE, number)
            stored = plan.contents.tensors.get(plan.contents.keys.get(place, ""))
            plan.leftover.append(place)
            plan.report.unexpected.append(Finding(key_of(place), 0 if stored is None else stored.size_bytes))


def _refuse_deferred(entry: Entry) -> None:
    parameters = [p for group in entry.value.param_groups for p in group["params"]]
    if any(record_of(parameter) is not None for parameter in parameters):
        raise UsageError(
            f"{entry.key} has deferred parameters, whose layout is not known yet. Load the model now and the optimizer "
            "after `setup`, or both after `setup`."
        )


class _Numbered:
    """A saved state in torch's form: numbers for the parameters, in the order that the optimizer has now.

    Attributes:
        groups: The parameter groups so far.
        state: The state so far, by number.
        restored: Each parameter that has a saved state, with its name and that state.
        by_order: Whether the saved state has torch's numbers, as other libraries save it. Parameters then match by
            order.
        saved_keys: The name of each saved parameter to its key in the saved state.
    """

    def __init__(self, plan: LoadPlan, entry: Entry, names: OptimizerNames, saved: dict[str, Any]) -> None:
        self.groups: list[dict[str, Any]] = []
        self.state: dict[Any, Any] = {}
        self.restored: list[tuple[Tensor, str, dict[str, Any]]] = []
        listed = [key for group in saved["param_groups"] for key in group["params"]]
        self.by_order = any(isinstance(key, int) for key in listed)
        here = [names.keys(p)[0] for group in entry.value.param_groups for p in group["params"]]
        if self.by_order:
            self.saved_keys = dict(zip(here, listed, strict=False))
        else:
            plain = plain_keys(listed, set(here))
            self.saved_keys = {plain.get(key, key): key for key in listed}
        self._plan = plan
        self._entry = entry
        self._names = names
        self._saved = saved
        self._number = 0

    def add_group(self, place: int) -> None:
        """Add the group at `place`, with its saved options and its present parameters."""
        group = self._entry.value.param_groups[place]
        options = dict(self._saved["param_groups"][place])
        called = {key: name for name, key in self.saved_keys.items()}
        unmet = dict.fromkeys(called[key] for key in options.pop("params"))
        first = self._number
        for parameter in group["params"]:
            self._add_parameter(place, parameter, unmet)
            self._number += 1
        for name in unmet:
            self._plan.report.unexpected.append(Finding(f"{self._entry.key}.param_groups.{place}: {name}", 0))
            if self.saved_keys[name] in self._saved["state"]:
                self._plan.leftover.append((*self._entry.path, "state", self.saved_keys[name]))
        for option in options:
            # A tensor, such as a learning rate that a compiled step reads, stays on its present device.
            device = group[option].device if isinstance(group.get(option), Tensor) else torch.device("cpu")
            options[option] = self._plan.tree(
                (*self._entry.path, "param_groups", place, option), partial(_zeros_on, device)
            )
        self.groups.append({**options, "params": list(range(first, self._number))})

    def _add_parameter(self, place: int, parameter: Tensor, unmet: dict[str, None]) -> None:
        state = self._entry.value.state
        keys = self._names.keys(parameter)
        name = next((key for key in keys if key in unmet), None)
        if name is None:
            self._plan.miss(f"{self._entry.key}.param_groups.{place}: {keys[0]}")
            if parameter in state:
                self.state[self._number] = state[parameter]
            return
        del unmet[name]
        key = self.saved_keys[name]
        if key in self._saved["state"]:
            path = (*self._entry.path, "state", key)
            fields = _fields(self._plan, path, parameter, state.get(parameter, {}))
            self.state[self._number] = fields
            self.restored.append((parameter, name if self.by_order else key, fields))


def _zeros_on(device: torch.device, place: KeyPath, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def _fields(plan: LoadPlan, path: KeyPath, parameter: Tensor, current: dict[str, Any]) -> Any:
    """Return the saved state of one parameter, to be read into the optimizer's own tensors or into new ones."""

    def target(place: KeyPath, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        field = place[len(path) :]
        have = current.get(field[0]) if len(field) == 1 else None
        if isinstance(have, Tensor) and has_data(have) and have.shape == shape and have.dtype == dtype:
            return have.detach()
        return _new(plan, place, path[-1], parameter)

    return plan.tree(path, target)


def _new(plan: LoadPlan, place: KeyPath, name: str, parameter: Tensor) -> Tensor:
    """Return a tensor to read the state at `place` into, with the layout that a step of the optimizer would give it.

    Args:
        plan: The plan, which knows the checkpoint's contents.
        place: The place of the tensor in the saved state.
        name: The key that the parameter had when it was saved.
        parameter: The parameter now.
    """
    contents = plan.contents
    key = contents.keys[place]
    shape, dtype = torch.Size(contents.tensors[key].shape), contents.tensors[key].dtype
    # The step count stays on the CPU and in its own dtype. torch, too, finds it by its name
    # (torch/optim/optimizer.py, `_process_value_according_to_param_policy`, 2.13).
    counts_steps = place[-1] == "step"
    was_whole = name in contents.sharded and key not in contents.sharded
    if counts_steps or (was_whole and is_sharded(parameter)):
        return torch.zeros(shape, dtype=dtype, device="cpu")
    if shape == parameter.shape:
        return torch.zeros_like(parameter.detach(), dtype=dtype)
    if is_sharded(parameter) and (shape or key in contents.sharded):
        return zeros_beside(parameter, shape, dtype, contents.sharded.get(key, []))
    return torch.zeros(shape, dtype=dtype, device="cpu")


def _keep_dtypes(fields: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Give fields back their saved dtypes: `load_state_dict` casts fp32 moments of bf16 weights to bf16."""
    for field, tensor in loaded.items():
        now = fields.get(field)
        if isinstance(tensor, Tensor) and isinstance(now, Tensor) and now.dtype != tensor.dtype:
            fields[field] = tensor.to(now.device)
