"""The state of an optimizer, loaded from a file that holds its `state_dict()`, as torch and other libraries write it.

Such a file numbers the parameters in the order in which the optimizer got them, so no model is needed to name them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from nucleate.checkpoint.loading.load_plan import LoadPlan
from nucleate.checkpoint.loading.optimizer_plan import plan_optimizer
from nucleate.checkpoint.state.entries import Entry, Kind, ParameterNames
from nucleate.checkpoint.state.tree import KeyPath, key_of
from nucleate.checkpoint.stored.contents import Contents
from nucleate.errors import CheckpointError, CheckpointNotFoundError

if TYPE_CHECKING:
    from nucleate.cluster.communicator import Communicator


class _Numbers(ParameterNames):
    """Names for the parameters of one optimizer, by their order.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__({})
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._numbered = {id(parameter): f"parameter {number}" for number, parameter in enumerate(parameters)}

    def keys(self, parameter: Tensor) -> list[str]:
        return [self._numbered[id(parameter)]]


def load_raw_optimizer(
    plan: LoadPlan, optimizer: Optimizer, communicator: Communicator, strict: bool, prefix: str, loading: str
) -> None:
    """Load an optimizer's state. Every rank reads only its own shards.

    Args:
        plan: The plan of the load, with the contents of the file.
        optimizer: The optimizer, wrapped or not.
        communicator: The ranks that load together.
        strict: Refuse a state that lacks parameters.
        prefix: The place of the state in the file, such as `"optimizer."`; empty if the file is the state alone.
        loading: The name of the work, for messages.

    Raises:
        CheckpointNotFoundError: There is no optimizer's state at this place.
        CheckpointError: The state names its parameters, or does not fit the optimizer.
        RankFailedError: One of these errors happened on another rank.
    """
    with communicator.all_or_none(loading):
        path: KeyPath = tuple(prefix.strip(".").split(".")) if prefix.strip(".") else ()
        plan.take(plan.contents.made(lambda place: place[: len(path)] == path or path[: len(place)] == place))
        _check(plan.contents, path)
        plan_optimizer(plan, Entry(path, Kind.OPTIMIZER, optimizer, {}), _Numbers(optimizer))
        plan.check(strict)
    with communicator.all_or_none(loading):
        plan.execute()
    for _, finish in plan.finish:
        with communicator.all_or_none(loading):
            finish()


def _check(contents: Contents, path: KeyPath) -> None:
    saved = contents.at(path) if contents.has(path) else None
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        places = [key_of(place) for place in ((name,) for name in contents.skeleton) if _is_state(contents, place)]
        advice = f" Pass prefix={places[0] + '.'!r}." if places else ""
        where = f"at {key_of(path)!r} in {contents.path}" if path else f"in {contents.path}"
        raise CheckpointNotFoundError(f"there is no state of an optimizer {where}.{advice}")
    if any(isinstance(key, str) for group in saved["param_groups"] for key in group["params"]):
        raise CheckpointError(
            f"the optimizer's state in {contents.path} has the names of its parameters. `load` finds them: "
            '`runtime.load(path, {"model": model, "optimizer": optimizer})`.'
        )


def _is_state(contents: Contents, place: KeyPath) -> bool:
    saved = contents.at(place)
    return isinstance(saved, dict) and {"state", "param_groups"} <= saved.keys()
