"""The parameters that a model had before its setup, and the optimizers that were built on them.

Precisions and strategies may put other objects in their places. This file points the optimizers that `setup` gets to
the new objects, and marks the old ones for all other optimizers. It keeps an old real parameter alive only if somebody
else does.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nucleate.deferred import handle_of
from nucleate.errors import ConfigurationError, UsageError, name_list
from nucleate.shells import named_modules, named_parameters
from nucleate.wrappers.optimizer import OptimizerWrapper
from nucleate.wrappers.replaced import mark_replaced, refuse_replaced, replaced_fqn


class FormerParameters:
    """The parameters of a model before its setup.

    Args:
        model: The model.

    Raises:
        UsageError: An earlier setup, of a model that shares parameters with this one, has replaced some of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._title = type(model).__name__
        named = dict(named_parameters(model, remove_duplicate=False))
        taken = {name: fqn for name, p in named.items() if (fqn := replaced_fqn(p)) is not None}
        if taken:
            raise UsageError(
                f"{self._title} shares parameters with a model that was set up before, and that setup has replaced "
                f"them: {name_list(taken)}. Put both models into one module and set that up."
            )
        self._names = {id(p): name for name, p in named.items()}
        with torch._C.DisableTorchFunctionSubclass():  # The underlying meta tensors know it without the guards' costs.
            self._trained = {id(p) for p in named.values() if p.requires_grad}
        del named
        self._kept = _kept_by_others(model)

    def check(self, optimizer: Optimizer, model: nn.Module, shards: bool) -> list[Tensor]:
        """Refuse an optimizer that cannot be set up with the model, before any change.

        Args:
            optimizer: The user's optimizer.
            model: The model.
            shards: Whether the strategy replaces the parameters.

        Returns:
            The parameters of the optimizer that the model does not have.

        Raises:
            UsageError: The object is not an optimizer, is set up already, has parameters that an earlier setup
                replaced, or has state for other tensors than it will train.
            ConfigurationError: The optimizer has deferred parameters of another model, or was built on another instance
                of this model.
        """
        if isinstance(optimizer, OptimizerWrapper):
            raise UsageError("this optimizer has been set up already. Use the optimizer that the first setup returned.")
        if not isinstance(optimizer, Optimizer):
            raise UsageError(f"setup takes optimizers after the model; got {type(optimizer).__name__}.")
        parameters = _parameters(optimizer)
        strangers = [p for p in parameters if id(p) not in self._names]
        refuse_replaced(type(optimizer).__name__, strangers)
        named = [handle.fqn for p in strangers if (handle := handle_of(p)) is not None]
        if named or (strangers and len(strangers) == len(parameters) and _fits(parameters, model)):
            described = name_list(named or (str(tuple(p.shape)) for p in strangers))
            raise ConfigurationError(
                f"{type(optimizer).__name__} has {len(strangers)} parameters that {self._title} does not have: "
                f"{described}. Build the optimizer on the parameters of the model that you set up with it."
            )
        state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
        if state and (shards or any(tensor.is_meta or handle_of(tensor) for tensor in state)):
            raise UsageError(
                f"{type(optimizer).__name__} already has state, which was made for other parameters than it will "
                "train. Build it after setup, from the parameters of the model that `setup` returned, then call "
                "`runtime.setup_optimizers(optimizer)`."
            )
        return strangers

    def refuse_frozen(self, optimizers: Sequence[Optimizer], model: nn.Module) -> None:
        """Refuse optimizers of parameters that do not train any more.

        Args:
            optimizers: Optimizers that `check` has accepted.
            model: The model after the precision's setup.

        Raises:
            ConfigurationError: The precision has quantized or removed a parameter.
        """
        with torch._C.DisableTorchFunctionSubclass():
            current = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
        every = [parameter for optimizer in optimizers for parameter in self._of_model(optimizer)]
        if all(id(p) in current and (current[id(p)] or id(p) not in self._trained) for p in every):
            return
        now = _by_name(model)
        for optimizer in optimizers:
            named = [(self._names[id(p)], id(p) in self._trained) for p in self._of_model(optimizer)]
            frozen = [name for name, trained in named if name not in now or (trained and not now[name].requires_grad)]
            if frozen:
                # The precision has replaced parameters already, and the next setup will not know the old ones.
                self.retire(model)
                raise ConfigurationError(
                    f"{type(optimizer).__name__} has {name_list(frozen)}, which the precision has quantized and which "
                    "cannot train. Set the model up alone, build the optimizer on the model's parameters that require "
                    "gradients, and call `runtime.setup_optimizers(optimizer)`."
                )

    def repoint(self, optimizers: Sequence[Optimizer], model: nn.Module) -> None:
        """Replace the parameters of optimizers by the current parameters of the same names.

        Args:
            optimizers: Optimizers that `check` has accepted.
            model: The model after the strategy's setup.
        """
        current = {id(parameter) for parameter in model.parameters()}
        if all(id(parameter) in current for optimizer in optimizers for parameter in self._of_model(optimizer)):
            return
        now, names = _by_name(model), self._names
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                # In place: some optimizers (LBFGS) keep the list itself.
                group["params"][:] = [now[names[id(p)]] if id(p) in names else p for p in group["params"]]

    def retire(self, model: nn.Module) -> None:
        """Mark the parameters that the model does not have any more; reading their gradients is then an error.

        Args:
            model: The model after its setup.
        """
        current = {id(parameter) for parameter in model.parameters()} if self._kept else set()
        for name, parameter in self._kept.items():
            # A tied parameter gets the first of its names.
            if id(parameter) not in current and replaced_fqn(parameter) is None:
                mark_replaced(parameter, name)
        self._kept.clear()

    def _of_model(self, optimizer: Optimizer) -> list[Tensor]:
        """Return the parameters of an optimizer that the model had before its setup."""
        return [parameter for parameter in _parameters(optimizer) if id(parameter) in self._names]


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _fits(parameters: Sequence[Tensor], model: nn.Module) -> bool:
    """Return whether parameters have the shapes of all of a model's parameters: they are those of another instance."""
    with torch._C.DisableTorchFunctionSubclass():
        return [p.shape for p in parameters] == [p.shape for p in model.parameters()]


def _by_name(model: nn.Module) -> Mapping[str, nn.Parameter]:
    return dict(named_parameters(model, remove_duplicate=False))


def _kept_by_others(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that can outlive their replacement: deferred ones, and those that others refer to.

    A real parameter to which only the model refers is left out, so that its memory is free as soon as it is replaced.
    A weak reference would do as well, but `torch.utils.swap_tensors` refuses tensors that have one.
    """
    places = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    kept: dict[str, nn.Parameter] = {}
    # A parameter in one place of one module, read as below.
    registry: Mapping[str, nn.Parameter | None] = {"": nn.Parameter(torch.empty(0))}
    parameter = registry[""]
    alone = sys.getrefcount(parameter)
    for prefix, module in named_modules(model):
        registry = module._parameters
        for name in registry.keys():  # noqa: SIM118 - the registry of a scripted module has no `__iter__`
            parameter = registry[name]
            if parameter is None:
                continue
            num_others = sys.getrefcount(parameter) - alone - (places[id(parameter)] - 1)
            if num_others > 0 or handle_of(parameter) is not None:
                kept[f"{prefix}.{name}" if prefix else name] = parameter
    return kept
