"""Activation checkpointing, as a dimension: chosen modules run their forward again in backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from nucleate.dimensions.base import Dimension
from nucleate.dimensions.module_policy import ModulePolicy, check_policy
from nucleate.layout import Mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ActivationCheckpointing(Dimension):
    """Modules that keep only their inputs for backward, and compute their activations again there.

    Args:
        policy: The modules: `"auto"` finds repeated blocks; or classes of modules; or a function of a module's name and
            the module; or a policy of torch.distributed.fsdp.wrap.

    Raises:
        ConfigurationError: The policy is not valid.
    """

    name = "activation_checkpointing"
    after = ("tensor_parallel",)

    def __init__(self, policy: ModulePolicy = "auto") -> None:
        from nucleate.dimensions.recomputation import OPTION

        check_policy(policy, OPTION)
        self.policy = policy

    def check_model(self, model: nn.Module, mesh: Mesh) -> None:
        """Refuse a policy that chooses nothing that can run twice.

        Raises:
            ConfigurationError: The model lacks a class of the policy, or the policy chooses a module of TorchScript.
        """
        from nucleate.dimensions.recomputation import find_checkpointed

        find_checkpointed(model, self.policy)

    def apply(self, model: nn.Module, mesh: DeviceMesh | None = None) -> None:
        """Replace the forward of the chosen modules."""
        from nucleate.dimensions.recomputation import checkpoint_activations, find_checkpointed

        checkpoint_activations(find_checkpointed(model, self.policy), self.device)
