"""An optimizer whose step goes through the precision; all it knows and holds is the optimizer's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch.optim import Optimizer

from nucleate.precision.base import Precision


@final
class OptimizerWrapper(Optimizer):
    """Stands before the user's optimizer; a learning rate scheduler takes it as one.

    Args:
        optimizer: The user's optimizer.
        precision: Steps it, or skips a step whose gradients overflowed.
    """

    # The base's __init__ is not called: it would make parameter groups, state and hooks beside the real ones.
    def __init__(self, optimizer: Optimizer, precision: Precision) -> None:
        self.optimizer = optimizer
        self.precision = precision

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's own parameter groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The optimizer's own state by parameter."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The optimizer's own defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the optimizer as the precision does it.

        Args:
            closure: Computes the loss anew and returns it; for optimizers that want one.

        Returns:
            What the optimizer's step returned, or None for a step that was skipped.
        """
        return self.precision.step(self.optimizer, closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the optimizer's parameters."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Give the optimizer more parameters."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's own state dict."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the optimizer's own state dict."""
        self.optimizer.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        # While unpickling there is no optimizer yet, and asking for it would come here again.
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out `step` as a scheduler patched it, as torch's optimizers do: that cannot be pickled."""
        return {"optimizer": self.optimizer, "precision": self.precision}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"OptimizerWrapper({self.optimizer!r})"
