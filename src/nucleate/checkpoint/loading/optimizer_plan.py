"""The plan of an optimizer's load: names become numbers again, and a state that was never there gets its tensors.

It never takes a step to find out what the state of an optimizer that never stepped looks like.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nucleate.checkpoint.loading.load_plan import Plan
from nucleate.checkpoint.loading.report import Finding
from nucleate.checkpoint.state.entries import Entry, ParameterNames
from nucleate.checkpoint.state.optimizer_names import check_named
from nucleate.checkpoint.state.tree import KeyPath, has_data
from nucleate.deferred import record_of
from nucleate.errors import UsageError
from nucleate.layout import is_sharded, zeros_beside


def plan_optimizer(plan: Plan, entry: Entry, names: ParameterNames) -> None:
    """Add the reading of an optimizer's state to `plan`.

    Args:
        plan: Receives what to read, what does not fit, and what to call at the end.
        entry: An optimizer, whose state is in the checkpoint.
        names: The keys of the parameters of the modules that are loaded with it.

    Raises:
        UsageError: Parameters of the optimizer are in none of these modules.
    """
    optimizer: Optimizer = entry.value
    check_named(entry, names)
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
    numbered = _Numbered(plan, entry, names, saved)
    if numbered.by_order and any(
        len(theirs["params"]) != len(ours["params"])
        for theirs, ours in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ):
        plan.unfit.append(
            f"{entry.key} goes by the order of its parameters in the checkpoint, but has another number of them here"
        )
        return
    for place in range(len(optimizer.param_groups)):
        numbered.add_group(place)
    others = {
        key: plan.tree((*entry.path, "state", key)) for key in saved["state"] if key not in numbered.saved_keys.values()
    }
    top = {key: plan.tree((*entry.path, key)) for key in saved if key not in ("state", "param_groups")}

    def finish() -> None:
        optimizer.load_state_dict({**top, "state": {**others, **numbered.state}, "param_groups": numbered.groups})
        for parameter, name, fields in numbered.restored:
            stored = plan.contents.tensors.get(name)
            if stored is not None and stored.dtype == parameter.dtype:
                _keep_dtypes(optimizer.state[parameter], fields)

    plan.finish.append((entry.key, finish))


def _refuse_deferred(entry: Entry) -> None:
    parameters = [p for group in entry.value.param_groups for p in group["params"]]
    if any(record_of(parameter) is not None for parameter in parameters):
        raise UsageError(
            f"{entry.key} has deferred parameters, of which it is not known yet how they are laid out. Load the model "
            "now and the optimizer after `setup`, or both after `setup`."
        )


class _Numbered:
    """A saved state on its way back to torch's form, with numbers for the parameters as the optimizer has them now.

    Attributes:
        groups: The parameter groups so far.
        state: The state so far, by number.
        restored: Each parameter that has a saved state, with its name and that state.
        by_order: Whether the saved state goes by torch's numbers, as those of others do: then by their order.
        saved_keys: The names of all parameters that were saved to what the saved state calls them.
    """

    def __init__(self, plan: Plan, entry: Entry, names: ParameterNames, saved: dict[str, Any]) -> None:
        self.groups: list[dict[str, Any]] = []
        self.state: dict[Any, Any] = {}
        self.restored: list[tuple[Tensor, str, dict[str, Any]]] = []
        listed = [key for group in saved["param_groups"] for key in group["params"]]
        self.by_order = any(isinstance(key, int) for key in listed)
        here = [names.keys(p)[0] for group in entry.value.param_groups for p in group["params"]]
        self.saved_keys = dict(zip(here, listed, strict=False)) if self.by_order else {key: key for key in listed}
        self._plan = plan
        self._entry = entry
        self._names = names
        self._saved = saved
        self._number = 0

    def add_group(self, place: int) -> None:
        """Add the group at `place`: its options as they were saved, its parameters as they are now."""
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
            # Tensors, such as a learning rate that a compiled step reads, stay on the device that they are on now.
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
            self.restored.append((parameter, name, fields))


def _zeros_on(device: torch.device, place: KeyPath, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def _fields(plan: Plan, path: KeyPath, parameter: Tensor, current: dict[str, Any]) -> Any:
    """Return the saved state of one parameter, read into what the optimizer has, or into new tensors."""

    def target(place: KeyPath, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        field = place[len(path) :]
        have = current.get(field[0]) if len(field) == 1 else None
        if isinstance(have, Tensor) and has_data(have) and have.shape == shape and have.dtype == dtype:
            return have.detach()
        return _new(plan, place, path[-1], parameter)

    return plan.tree(path, target)


def _new(plan: Plan, place: KeyPath, name: str, parameter: Tensor) -> Tensor:
    """Return a tensor to read the state at `place` into, laid out as a step of the optimizer would have done it.

    Args:
        plan: Whose contents tell what was saved.
        place: Where the state of the parameter stands.
        name: The key of the parameter when it was saved.
        parameter: The parameter now.
    """
    contents = plan.contents
    key = contents.keys[place]
    shape, dtype = torch.Size(contents.tensors[key].shape), contents.tensors[key].dtype
    # torch, too, knows the step count by its name: it stays on the CPU and in its own dtype
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
    """Put back what `load_state_dict` cast to the dtype of its parameter: fp32 moments of bf16 weights are meant."""
    for field, tensor in loaded.items():
        now = fields.get(field)
        if isinstance(tensor, Tensor) and isinstance(now, Tensor) and now.dtype != tensor.dtype:
            fields[field] = tensor.to(now.device)
