"""Replaced parameters: objects whose place in a model another object took in `setup`.

A replaced parameter gets no gradient. An optimizer that was built before `setup` may still have it. Such an optimizer
would find no gradient, skip the parameter at each step, and train nothing. So `setup` gives a replaced parameter
another class, whose `grad` raises an error with the FQN. The class is changed in place, as torch does for
`UninitializedParameter` (torch/nn/parameter.py). No optimizer needs a hook, because all of them read `grad`, in
`zero_grad` too.

Everything else works as before: values, hashes, `repr`, operators and an optimizer's `state_dict`. A deep copy is a
replaced parameter too, because an optimizer that is copied with it trains nothing either. A pickle holds a plain
parameter, so that it can be loaded without nucleate. `nn.Parameter(old)` and `copy.copy(old)` are new plain parameters.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from nucleate.deferred import release
from nucleate.errors import UsageError, name_list

_NAME = "_nucleate_replaced"
_CURE = (
    "Pass the optimizer to `setup`, as in `model, optimizer = runtime.setup(model, optimizer)`, or build it afterwards "
    "on the parameters of the model that `setup` returned."
)


def mark_replaced(parameter: Any, fqn: str) -> None:
    """Mark a parameter as replaced. From now on its `grad` raises an error.

    Args:
        parameter: The old parameter, which the model does not have any more.
        fqn: The FQN of the place where it was.
    """
    release(parameter)
    # A subclass with its own object layout keeps its class.
    with suppress(TypeError):
        cls: type[Tensor] = type(parameter)
        parameter.__class__ = _replaced_class(cls)
        parameter.__dict__[_NAME] = fqn


def replaced_fqn(tensor: Any) -> str | None:
    """Return the FQN of the place where a replaced parameter was, or None for any other object."""
    return tensor.__dict__[_NAME] if isinstance(tensor, Replaced) else None


def refuse_replaced(optimizer: str, parameters: Iterable[Any]) -> None:
    """Refuse replaced parameters.

    Args:
        optimizer: The name of the optimizer that would get the parameters.
        parameters: The parameters, among other objects.

    Raises:
        UsageError: Some of them are replaced parameters; the message gives their FQNs.
    """
    fqns = [fqn for parameter in parameters if (fqn := replaced_fqn(parameter)) is not None]
    if fqns:
        raise UsageError(
            f"{optimizer} has parameters that `setup` has replaced in their model: {name_list(fqns)}. They get no "
            f"gradient, so {optimizer} would train nothing. {_CURE}"
        )


class Replaced:
    """The mixin in the class of a replaced parameter."""

    def _refuse_gradient(self, *_: Any) -> Any:
        fqn = self.__dict__[_NAME]
        raise UsageError(
            f"this is the former parameter {fqn}, which `setup` has replaced in the model. It gets no gradient, so an "
            f"optimizer that has it would train nothing. {_CURE}"
        )

    grad = property(_refuse_gradient, _refuse_gradient, _refuse_gradient)

    def detach(self) -> Tensor:
        """Return a plain tensor, but the class that `nn.Parameter(old)` expects (torch/nn/parameter.py, 2.13)."""
        plain: Tensor = super().detach()  # type: ignore[misc]
        if sys._getframe(1).f_code is nn.Parameter.__new__.__code__:
            plain.__dict__[_NAME] = self.__dict__[_NAME]
            plain.__class__ = type(self)  # type: ignore[assignment]
        return plain

    @property
    def _is_param(self) -> bool:
        return bool(self.__dict__.get("_is_param", False))

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        # `nn.Parameter(old)` sets this on the new parameter, which is not replaced.
        del self.__dict__[_NAME]
        self.__class__ = _former_class(self)  # type: ignore[assignment]
        if not issubclass(type(self), nn.Parameter):
            self._is_param = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with _lifted(self):
            clone = copy.deepcopy(self, memo)
        mark_replaced(clone, self.__dict__[_NAME])
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _lifted(self):
            function, arguments, *rest = self.__reduce_ex__(protocol)
            # The attributes are read later, when they have the mark again.
            arguments = tuple(dict(item) if item is self.__dict__ else item for item in arguments)
        return function, arguments, *rest


@contextmanager
def _lifted(parameter: Any) -> Iterator[None]:
    """Give a replaced parameter its former class and attributes inside the context."""
    cls, fqn = type(parameter), parameter.__dict__.pop(_NAME)
    parameter.__class__ = _former_class(parameter)
    try:
        yield
    finally:
        parameter.__class__ = cls
        parameter.__dict__[_NAME] = fqn


def _former_class(parameter: Any) -> type[Tensor]:
    # The bases are `Replaced` and the former class.
    former: type[Tensor] = type(parameter).__bases__[1]
    return former


@functools.cache
def _replaced_class(cls: type[Tensor]) -> type[Tensor]:
    return type(f"Replaced{cls.__name__}", (Replaced, cls), {})
