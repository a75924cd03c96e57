"""Plans of tensor parallel that a library brings with its models, for `TensorParallel(plan="auto")`.

A library may have styles of its own, which only its own functions can apply. An integration declares an object that
calls them, as it declares units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from nucleate.layout import Shard
from nucleate.registry import INTEGRATIONS
from nucleate.shells import named_modules

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# An attribute of the module itself, so that copies of a model have it too.
_DECLARED = "_nucleate_model_plan"


class ModelPlan(ABC):
    """The plan of tensor parallel of a library's models, applied by the library's own functions.

    The object may serve many models, and keeps nothing of them.
    """

    @abstractmethod
    def check(self, model: nn.Module, size: int) -> None:
        """Refuse a model that the plan does not fit, before anything is changed. It must not exchange anything.

        Args:
            model: The model, whose deferred tensors appear as meta tensors.
            size: The number of ranks that split it.

        Raises:
            ConfigurationError: The plan does not fit; the message gives the FQNs.
        """

    @abstractmethod
    def splits(self, model: nn.Module) -> Mapping[str, Shard | None] | None:
        """Return the parameters that `apply` makes DTensors, as plain data.

        Args:
            model: The model, which `check` has accepted.

        Returns:
            For each FQN the split of its whole tensor, or None for one that each rank holds whole. None if they are
            known only after `apply`.
        """

    @abstractmethod
    def apply(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Lay the model out in place, without making or exchanging values. Tied parameters must be laid out alike.

        Args:
            model: The model, whose deferred tensors are on the meta device.
            mesh: torch's mesh of the ranks that split the model.
        """


class DeclaredPlans:
    """The declared plans of a model: its own, or those of the outermost parts that have one.

    Attributes:
        parts: The FQN of each part, the part and its plan.
    """

    def __init__(self, parts: list[tuple[str, nn.Module, ModelPlan]]) -> None:
        self.parts = parts

    @classmethod
    def of(cls, model: nn.Module) -> DeclaredPlans | None:
        """Return the declared plans of a model, or None if it has none."""
        parts: list[tuple[str, nn.Module, ModelPlan]] = []
        for name, module in named_modules(model):
            plan = vars(module).get(_DECLARED)
            if plan is not None and not any(f"{name}.".startswith(_prefix(outer)) for outer, _, _ in parts):
                parts.append((name, module, plan))
        return cls(parts) if parts else None

    def check(self, model: nn.Module, size: int) -> None:
        """Refuse a model that a plan does not fit; see `ModelPlan.check`."""
        for _, module, plan in self.parts:
            plan.check(module, size)

    def splits(self, model: nn.Module) -> dict[str, Shard | None] | None:
        """Return the parameters that become DTensors; see `ModelPlan.splits`."""
        found: dict[str, Shard | None] = {}
        for name, module, plan in self.parts:
            splits = plan.splits(module)
            if splits is None:
                return None
            found.update({f"{_prefix(name)}{fqn}": split for fqn, split in splits.items()})
        return found

    def apply(self, model: nn.Module, mesh: DeviceMesh, loss_parallel: bool) -> None:
        """Apply each plan to its part."""
        for _, module, plan in self.parts:
            plan.apply(module, mesh)


def declare_plan(model: nn.Module, plan: ModelPlan) -> None:
    """Declare the plan of tensor parallel of a model, for `TensorParallel(plan="auto")`.

    Args:
        model: The model. It may be a part of the model that `Runtime.setup` gets.
        plan: The plan.
    """
    model.__dict__[_DECLARED] = plan


def missing_integration(model: nn.Module) -> str:
    """Return a sentence with the integration that knows a model's class, or an empty text for a class of its own."""
    for library in dict.fromkeys(cls.__module__.partition(".")[0] for cls in type(model).__mro__):
        if library in INTEGRATIONS.known:
            return (
                f"It is a plan of {library}, whose own functions apply it. Install the integration "
                f"({INTEGRATIONS.known[library]}); `Runtime.setup` then takes its plan."
            )
    return ""


def _prefix(name: str) -> str:
    return f"{name}." if name else ""
