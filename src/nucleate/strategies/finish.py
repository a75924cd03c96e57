"""The part of a set up that is the same for every strategy, around its `lay_out`: from the plan to the values.

A strategy lays out meta tensors with torch's own means. They replace parameters by new objects, which lose ties,
attributes and hooks. This file gives these back, and materializes this rank's part of every tensor.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from nucleate.cluster.communicator import Communicator
from nucleate.errors import ConfigurationError, name_list
from nucleate.layout.agreement import broadcast_real, verify_replicas
from nucleate.materialize import Plan, execute


class Steps(Protocol):
    """The part of a strategy that `finish` calls; see `Strategy`."""

    device: torch.device

    @property
    def storage_device(self) -> torch.device: ...

    @property
    def communicator(self) -> Communicator: ...

    def check_model(self, model: nn.Module) -> None: ...

    def lay_out(self, model: nn.Module) -> None: ...

    def enclose(self, model: nn.Module) -> nn.Module: ...


def finish(strategy: Steps, model: nn.Module, plan: Plan) -> nn.Module:
    """Lay a model out, materialize it, and return the module to call.

    Args:
        strategy: The strategy.
        model: The model, deferred or real.
        plan: The model's plan.

    Raises:
        ConfigurationError: The strategy refuses the model, or has undone a tie. After a refusal the model is as before.
        RankDisagreementError: The ranks have other real tensors, or made different values from the same recipes.
    """
    communicator = strategy.communicator
    plan.check_device(strategy.device)
    # The checks need only metadata, so they read the underlying meta tensors without the cost of the guards.
    with torch._C.DisableTorchFunctionSubclass():
        strategy.check_model(model)
    plan.release()
    try:
        # Each rank cuts its part from its own copy of a real tensor, so all copies must be equal.
        broadcast_real(model, communicator)
        before = Before(model)
        strategy.lay_out(model)
        before.tie_again(model)
    except BaseException:
        plan.restore()
        raise
    # If one rank cannot read a file, the other ranks must not wait for it below.
    with communicator.all_or_none("making parameters"):
        execute(plan, model, strategy.device, strategy.storage_device)
    before.tie_again(model)
    before.restore(model)
    verify_replicas(model, communicator)
    return strategy.enclose(model)


class Before:
    """The facts about a model's parameters that a new object in their place does not have.

    Args:
        model: The model, before it is laid out.
    """

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_parameters(remove_duplicate=False))
        self._objects = named
        self._hooks = {name: p._post_accumulate_grad_hooks for name, p in named.items()}
        # Attributes that users set, without our own.
        self._attributes = {
            name: {key: value for key, value in vars(p).items() if not key.startswith("_nucleate")}
            for name, p in named.items()
        }
        ties: dict[int, list[str]] = {}
        for name, parameter in named.items():
            ties.setdefault(id(parameter), []).append(name)
        self._ties = [names for names in ties.values() if len(names) > 1]

    def tie_again(self, model: nn.Module) -> None:
        """Tie the names again that stood for one parameter.

        Raises:
            ConfigurationError: The strategy has laid them out differently.
        """
        if not self._ties:
            return
        modules = dict(model.named_modules(remove_duplicate=False))
        for names in self._ties:
            places = [(modules[prefix], key) for prefix, _, key in (name.rpartition(".") for name in names)]
            found = [module._parameters[key] for module, key in places]
            distinct = {id(parameter): parameter for parameter in found}
            if len(distinct) == 1:
                continue
            if len({_form(parameter) for parameter in distinct.values()}) > 1:
                raise ConfigurationError(
                    f"{name_list(names)} are tied, and the strategy lays them out in different ways: "
                    f"{name_list(dict.fromkeys(_form(parameter) for parameter in found))}. Lay them out alike, or "
                    "untie them in the constructor."
                )
            for module, key in places:
                module._parameters[key] = found[0]

    def restore(self, model: nn.Module) -> None:
        """Give new parameter objects the attributes and hooks of those in whose place they are."""
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name not in self._objects or self._objects[name] is parameter:
                continue
            for key, value in self._attributes[name].items():
                setattr(parameter, key, value)
            if self._hooks[name]:
                parameter._post_accumulate_grad_hooks = self._hooks[name]


def _form(parameter: Any) -> str:
    placements = getattr(parameter, "placements", None)
    return "whole" if placements is None else f"{placements} on {parameter.device_mesh}"
