"""An optimizer's state by the names of its parameters, not by their numbers.

torch numbers an optimizer's parameters in the order in which the optimizer got them. The numbers mean nothing in
another run that orders or shards the parameters differently.

A parameter has the key of its value in the checkpoint as its name. The value of a parameter that no model has is saved
with the optimizer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nucleate.checkpoint.state.entries import Entry, ParameterNames
from nucleate.checkpoint.state.tree import key_of
from nucleate.errors import CheckpointError, UsageError, name_list
from nucleate.layout import is_sharded, local_of

#: The place of the parameters that no model has, in the saved state of their optimizer.
FREE = "free_parameters"


class OptimizerNames:
    """The names of the parameters of one optimizer.

    Args:
        entry: The optimizer. It may list parameters that no model has in its attribute `free_parameters`.
        names: The keys of the parameters of the modules that are saved or loaded with the optimizer.
    """

    def __init__(self, entry: Entry, names: ParameterNames) -> None:
        self._names = names
        # The wrapper lists them; torch's optimizers have no such attribute.
        free = enumerate(getattr(entry.value, FREE, ()))
        self.free: dict[str, Tensor] = {str(number): p for number, p in free if not names.keys(p)}
        self._keys = {id(p): key_of((*entry.path, FREE, number)) for number, p in self.free.items()}

    def keys(self, parameter: Tensor) -> list[str]:
        """Return the keys of `parameter`; empty if neither a module nor the optimizer saves it."""
        free = self._keys.get(id(parameter))
        return self._names.keys(parameter) if free is None else [free]


def named_state(entry: Entry, names: ParameterNames) -> dict[str, Any]:
    """Return the optimizer's `state_dict()`, with the key of each parameter in place of its number.

    Args:
        entry: An optimizer.
        names: The keys of the parameters of the modules that are saved with the optimizer.

    Raises:
        UsageError: Some parameters of the optimizer are not in these modules.
        CheckpointError: A tensor of the state belongs to one rank only, but looks like a whole tensor.
    """
    optimizer: Optimizer = entry.value
    own = OptimizerNames(entry, names)
    check_named(entry, own)
    packed = optimizer.state_dict()
    parameters: dict[int, Tensor] = {}
    groups = []
    for group, numbered in zip(optimizer.param_groups, packed["param_groups"], strict=True):
        parameters.update(zip(numbered["params"], group["params"], strict=True))
        groups.append({**numbered, "params": [own.keys(parameter)[0] for parameter in group["params"]]})
    state: dict[Any, Any] = {}
    for number, fields in packed["state"].items():
        if number not in parameters:
            state[number] = fields
            continue
        name = own.keys(parameters[number])[0]
        _refuse_local_parts(f"{entry.key}.state.{name}", fields, parameters[number])
        state[name] = fields
    return {**packed, "state": state, "param_groups": groups, **({FREE: own.free} if own.free else {})}


def check_named(entry: Entry, names: OptimizerNames) -> None:
    """Make sure that every parameter of an optimizer has a name.

    Raises:
        UsageError: Some parameters of the optimizer are not in the modules, and some model has them.
    """
    lost = [
        f"param_groups[{place}]['params'][{number}] {tuple(parameter.shape)}"
        for place, group in enumerate(entry.value.param_groups)
        for number, parameter in enumerate(group["params"])
        if not names.keys(parameter)
    ]
    if lost:
        raise UsageError(
            f"{len(lost)} parameters of {entry.key} belong to no module in the state: {name_list(lost)}. A checkpoint "
            "names the parameters of an optimizer's state: put the module that has them into the same state, and "
            "build the optimizer on the parameters that this module has now."
        )


def _refuse_local_parts(where: str, fields: Any, parameter: Tensor) -> None:
    """Raise if a plain tensor in the state of a sharded parameter has the shape of this rank's shard."""
    if not is_sharded(parameter) or not isinstance(fields, dict):
        return
    local_shape = local_of(parameter).shape
    if local_shape == parameter.shape:
        return
    for field, tensor in fields.items():
        if isinstance(tensor, Tensor) and not is_sharded(tensor) and tensor.shape == local_shape and tensor.ndim:
            raise CheckpointError(
                f"{where}.{field} is a plain tensor {tuple(tensor.shape)}, the shape of this rank's shard of a "
                f"parameter {tuple(parameter.shape)}. Only rank 0's tensor would be saved. The optimizer must keep a "
                "DTensor, as `torch.zeros_like(parameter)` makes it."
            )
