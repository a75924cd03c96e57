"""The part of a setup that is the same for every strategy: from the plan to the values, around its `lay_out`.

A strategy lays out meta tensors with torch's own means. They replace parameters by new objects, which lose ties,
attributes and hooks. This file gives these back, and materializes this rank's part of every tensor.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import nn

from nucleate.cluster.communicator import Communicator
from nucleate.errors import ConfigurationError, name_list
from nucleate.layout import layout_of
from nucleate.layout.agreement import broadcast_real, verify_replicas
from nucleate.materialize import Plan, execute
from nucleate.shells import named_modules, named_parameters
from nucleate.strategies.gathering import follow_units
from nucleate.strategies.module_policy import ModulePolicy


class Steps(Protocol):
    """The part of a strategy that `finish` calls; see `Strategy`."""

    device: torch.device
    shards: ClassVar[bool]
    activation_checkpointing_policy: ModulePolicy | None

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
        checkpointed = _checkpointed(model, strategy.activation_checkpointing_policy)
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
    if strategy.shards:
        follow_units(model)
    if checkpointed:
        from nucleate.strategies.activation_checkpointing import checkpoint_activations

        checkpoint_activations(checkpointed, strategy.device)
    return strategy.enclose(model)


def _checkpointed(model: nn.Module, policy: ModulePolicy | None) -> list[nn.Module]:
    """Return the modules whose activations are not kept. Without a policy, nothing is imported."""
    if policy is None:
        return []
    from nucleate.strategies.activation_checkpointing import find_checkpointed

    return find_checkpointed(model, policy)


class Before:
    """The facts about a model's parameters that a new object in their place does not have.

    Args:
        model: The model, before it is laid out.
    """

    def __init__(self, model: nn.Module) -> None:
        # The objects themselves are not kept: a real parameter's memory is free as soon as it is replaced.
        named = dict(named_parameters(model, remove_duplicate=False))
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
        modules = dict(named_modules(model, remove_duplicate=False))
        for names in self._ties:
            places = [(modules[prefix], key) for prefix, _, key in (name.rpartition(".") for name in names)]
            held = [module._parameters[key] for module, key in places]
            found = [parameter for parameter in held if parameter is not None]
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
        if not any(self._attributes.values()) and not any(self._hooks.values()):
            return
        for name, parameter in named_parameters(model, remove_duplicate=False):
            for key, value in self._attributes.get(name, {}).items():
                if key not in vars(parameter):
                    setattr(parameter, key, value)
            hooks = self._hooks.get(name)
            if hooks and parameter._post_accumulate_grad_hooks is not hooks:
                parameter._post_accumulate_grad_hooks = hooks


def _form(parameter: nn.Parameter) -> str:
    found = layout_of(parameter, 1)
    placements = ", ".join(map(str, found.placements)) or "whole"
    return f"{placements} on {found.mesh}"
