"""A wrapped optimizer whose step goes through the precision; its groups and state are the user's optimizer's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

from torch import Tensor, nn
from torch.optim import Optimizer

from nucleate.deferred import handle_of
from nucleate.errors import ConfigurationError, UsageError, name_list
from nucleate.precision.base import Precision


@final
class OptimizerWrapper(Optimizer):
    """A wrapper of the user's optimizer; a learning rate scheduler accepts it as an optimizer.

    Args:
        optimizer: The user's optimizer.
        precision: Steps the optimizer, or skips a step whose gradients overflowed.
    """

    # The base's __init__ is not called: it would make a second set of parameter groups, state and hooks.
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
        """Step the optimizer through the precision.

        Args:
            closure: Computes the loss again and returns it, for optimizers that need a closure.

        Returns:
            The result of the optimizer's step, or None if the step was skipped.
        """
        return self.precision.step(self.optimizer, closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the optimizer's parameters."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's own state dict."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the optimizer's own state dict."""
        self.optimizer.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        # While unpickling there is no optimizer yet, and the lookup would call this method without end.
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out a `step` that a scheduler patched, as torch's optimizers do: it cannot be pickled."""
        return {"optimizer": self.optimizer, "precision": self.precision}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"OptimizerWrapper({self.optimizer!r})"


def check_optimizer(optimizer: Optimizer, names: Mapping[int, str], model: nn.Module, shards: bool) -> None:
    """Refuse an optimizer that cannot be set up with a model, before any change.

    Args:
        optimizer: The user's optimizer.
        names: The FQN of each parameter of the model, by the parameter's id.
        model: The model that is set up with the optimizer.
        shards: Whether the strategy replaces the parameters.

    Raises:
        UsageError: The object is not an optimizer, is set up already, or has state for other tensors than it will
            train.
        ConfigurationError: The optimizer has parameters of another model.
    """
    if isinstance(optimizer, OptimizerWrapper):
        raise UsageError("this optimizer has been set up already. Use the optimizer that the first setup returned.")
    if not isinstance(optimizer, Optimizer):
        raise UsageError(f"setup takes optimizers after the model; got {type(optimizer).__name__}.")
    strangers = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
    if strangers:
        named = [handle.fqn for p in strangers if (handle := handle_of(p)) is not None]
        described = name_list(named or (str(tuple(p.shape)) for p in strangers))
        raise ConfigurationError(
            f"{type(optimizer).__name__} has {len(strangers)} parameters that {type(model).__name__} does not have: "
            f"{described}. Build the optimizer on the parameters of the model that you set up with it."
        )
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    if state and (shards or any(tensor.is_meta or handle_of(tensor) for tensor in state)):
        raise UsageError(
            f"{type(optimizer).__name__} already has state, which was made for other parameters than it will train. "
            "Build it after setup, from the parameters of the model that `setup` returned, then call "
            "`runtime.setup_optimizers(optimizer)`."
        )


def repoint(optimizer: Optimizer, names: Mapping[int, str], parameters: Mapping[str, nn.Parameter]) -> None:
    """Replace the optimizer's parameters by the current parameters of the same names.

    Args:
        optimizer: The user's optimizer.
        names: The FQN of each parameter of the optimizer, by the parameter's id.
        parameters: The parameters by FQN, after the strategy's `setup`.

    Raises:
        ConfigurationError: The precision has quantized a parameter, so that it no longer trains.
    """
    frozen = [
        names[id(parameter)]
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad and not parameters[names[id(parameter)]].is_floating_point()
    ]
    if frozen:
        raise ConfigurationError(
            f"{type(optimizer).__name__} has {name_list(frozen)}, which the precision has quantized and which cannot "
            "train. Set the model up alone, build the optimizer on the model's parameters that require gradients, and "
            "call `runtime.setup_optimizers(optimizer)`."
        )
    for group in optimizer.param_groups:
        # In place: some optimizers (LBFGS) keep the list itself.
        group["params"][:] = [parameters[names[id(parameter)]] for parameter in group["params"]]
