"""A wrapped optimizer whose step goes through precision and strategy; its groups and state are the real one's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, final

from torch import Tensor
from torch.optim import Optimizer

from nucleate.precision.base import Precision
from nucleate.strategies.base import Strategy
from nucleate.wrappers.accumulation import Accumulation
from nucleate.wrappers.free_parameters import FreeParameters
from nucleate.wrappers.replaced import refuse_replaced

#: The attributes of the wrapper itself. A scheduler patches the `step` of the optimizer that it gets: the wrapper.
_OWN = ("optimizer", "precision", "strategy", "_links", "step")

#: Returns the free parameters among others, or refuses parameters that an optimizer cannot train.
Check = Callable[[Optimizer, Iterable[Any]], list[Tensor]]


class StepEnd(Protocol):
    """The part of the end at SIGTERM that an optimizer needs."""

    def step_ended(self, optimizer: Optimizer, /) -> None:
        """Note the end of a step."""
        ...


class Hooks(Protocol):
    """The part of the callbacks that an optimizer needs."""

    def call(self, hook_name: str, /, *args: Any, **kwargs: Any) -> None:
        """Call a hook of every callback."""
        ...


@dataclass(frozen=True, slots=True)
class RuntimeLinks:
    """The parts of a runtime that a wrapped optimizer asks. None stands for a part that is absent.

    Attributes:
        check: Refuses parameters that the optimizer cannot train, before they are added, and returns those that no
            model has. Without it, all are accepted.
        accumulation: Lets the optimizer wait for the last micro-batch of a step.
        free: The parameters of optimizers that no model has. Without it, such parameters are left to the user.
        callbacks: Gets the call `on_after_optimizer_step` after each step.
        termination: Counts the steps, and ends the training after one of them at SIGTERM.
    """

    check: Check | None = None
    accumulation: Accumulation | None = None
    free: FreeParameters | None = None
    callbacks: Hooks | None = None
    termination: StepEnd | None = None


@final
class OptimizerWrapper(Optimizer):
    """A wrapper of the user's optimizer. `isinstance` takes it for an optimizer of the user's class, too.

    Args:
        optimizer: The user's optimizer.
        precision: Steps the optimizer, or skips a step whose gradients overflowed.
        strategy: Surrounds each step and reads the state to save. None does neither.
        links: The parts of the runtime that the wrapper asks. None is a wrapper without a runtime.
    """

    optimizer: Optimizer
    precision: Precision
    strategy: Strategy | None
    _links: RuntimeLinks

    # The base's __init__ is not called: it would make a second set of parameter groups, state and hooks.
    def __init__(
        self,
        optimizer: Optimizer,
        precision: Precision,
        strategy: Strategy | None = None,
        links: RuntimeLinks | None = None,
    ) -> None:
        self.__dict__.update(
            optimizer=optimizer, precision=precision, strategy=strategy, _links=links or RuntimeLinks()
        )

    # `isinstance` looks at the type first and at `__class__` second, so both answers are true. A subclass of the user's
    # class would inherit its methods, and these would write their attributes to the wrapper.
    @property  # type: ignore[misc]
    def __class__(self) -> type[Optimizer]:  # type: ignore[override]
        """The class of the user's optimizer."""
        # While unpickling there is no optimizer yet.
        return type(self.__dict__.get("optimizer", self))

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

    @property
    def free_parameters(self) -> list[Tensor]:
        """The optimizer's parameters that no model has. They are saved with the optimizer."""
        free = self._links.free
        return [] if free is None else free.of(self.optimizer)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the optimizer through the precision.

        If the optimizer has parameters that no model has, this method averages their gradients over the ranks first, so
        every rank must call it.

        Args:
            closure: Computes the loss again and returns it, for optimizers that need a closure.

        Returns:
            The result of the optimizer's step, or None if the step was skipped.
        """
        links = self._links
        if links.accumulation is not None and links.accumulation.hold_step(self.optimizer, closure):
            return None
        if links.free is not None and closure is None:
            links.free.average(self.optimizer)
        elif links.free is not None and closure is not None:
            closure = links.free.averaging(self.optimizer, closure)
        if self.strategy is None:
            return self.precision.step(self.optimizer, closure)
        with self.strategy.optimizer_step_context(self.optimizer):
            result = self.precision.step(self.optimizer, closure)
        if links.callbacks is not None:
            links.callbacks.call("on_after_optimizer_step", strategy=self.strategy, optimizer=self.optimizer)
        if links.termination is not None:
            links.termination.step_ended(self.optimizer)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the optimizer's parameters, unless `Runtime.accumulate` still needs them."""
        accumulation = self._links.accumulation
        if accumulation is not None and accumulation.keeps_gradients(self.optimizer):
            return
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the optimizer. Every rank calls this method.

        Args:
            param_group: The parameters and their options, as torch takes them.

        Raises:
            UsageError: `setup` has replaced some of the parameters in their model, or they have no value yet, or no
                model has them and they are not on the device of the runtime. Nothing has been changed.
            RankDisagreementError: The ranks add parameters of different shapes that no model has.
            ConfigurationError: The strategy cannot step the optimizer with these parameters. Nothing has been changed.
        """
        parameters = param_group.get("params") if isinstance(param_group, dict) else None
        if isinstance(parameters, Iterable) and not isinstance(parameters, (Tensor, set)):
            # An iterator can be read only once.
            parameters = param_group["params"] = list(parameters)
        if isinstance(parameters, Tensor):
            parameters = [parameters]
        added = [item[1] if isinstance(item, tuple) else item for item in parameters or ()]
        refuse_replaced(type(self.optimizer).__name__, added)
        check = self._links.check
        free = [] if check is None else check(self.optimizer, added)
        self.optimizer.add_param_group(param_group)
        if self.strategy is not None:
            try:
                self.strategy.setup_optimizer(self.optimizer)
            except BaseException:
                self.optimizer.param_groups.pop()
                raise
        if self._links.free is not None:
            self._links.free.add(self.optimizer, free)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's own state dict, as the strategy reads it."""
        return self.optimizer.state_dict() if self.strategy is None else self.strategy.optimizer_state(self.optimizer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the optimizer's own state dict."""
        self.optimizer.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        # While unpickling there is no optimizer yet, and the lookup would call this method without end.
        if name in _OWN:
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # torch's gradient scaler sets `grad_scale` on an optimizer that unscales gradients in its own step.
        if name in _OWN or isinstance(getattr(OptimizerWrapper, name, None), property):
            object.__setattr__(self, name, value)
        else:
            setattr(self.optimizer, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            object.__delattr__(self, name)
        else:
            delattr(self.optimizer, name)

    def __copy__(self) -> OptimizerWrapper:
        return OptimizerWrapper(self.optimizer, self.precision, self.strategy, self._links)

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizerWrapper:
        """Copy the optimizer, but keep the same precision and strategy."""
        memo[id(self)] = clone = copy.copy(self)
        clone.optimizer = copy.deepcopy(self.optimizer, memo)
        if self._links.free is not None:
            self._links.free.follow(self.optimizer, clone.optimizer)
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Leave out the strategy, and a `step` that a scheduler patched, as torch's optimizers do."""
        # pickle refuses the default way for an object whose `__class__` is not its type.
        return _empty, (), {"optimizer": self.optimizer, "precision": self.precision}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"strategy": None, "_links": RuntimeLinks(), **state})

    def __repr__(self) -> str:
        return f"OptimizerWrapper({self.optimizer!r})"


def _empty() -> OptimizerWrapper:
    return object.__new__(OptimizerWrapper)
