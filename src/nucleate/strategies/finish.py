"""The part of a setup that is the same for every strategy: from the plan to the values, around its `lay_out`.

A strategy lays out meta tensors with torch's own means. They replace parameters by new objects, which lose ties,
attributes and hooks. `Before` gives these back. This file also materializes this rank's part of every tensor.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from nucleate.cluster.communicator import Communicator
from nucleate.dimensions.sharding.gathering import follow_units
from nucleate.layout.agreement import broadcast_real, verify_replicas
from nucleate.materialize import Plan, execute
from nucleate.materialize.handover import Before


class Steps(Protocol):
    """The part of a strategy that `finish` calls; see `Strategy`."""

    device: torch.device

    @property
    def shards(self) -> bool: ...

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
    if strategy.shards:
        follow_units(model)
    return strategy.enclose(model)
