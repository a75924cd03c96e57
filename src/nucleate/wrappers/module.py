"""A wrapped model whose forward goes through precision and strategy; everything else is the user's model.

This file decides which methods count as forward, which calls are refused because they would bypass the strategy, and
where names are looked up. The two plugins do the work around forward. `special_methods` makes the class that has the
special methods of the model's class, and `nucleate.shells` knows the names without shells.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Container
from contextlib import nullcontext
from types import MethodType
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from nucleate.cluster.watch import CALLS
from nucleate.devices import made_current
from nucleate.errors import UsageError, name_list
from nucleate.layout import LiveLayout
from nucleate.precision.base import Precision
from nucleate.shells import inside, is_compiled, named_modules
from nucleate.strategies.base import Strategy
from nucleate.wrappers.compiled import compiled_like
from nucleate.wrappers.delegation import Delegating
from nucleate.wrappers.looks import LOOKS, look, shown_by
from nucleate.wrappers.scaled_backward import refuse_plain_backward
from nucleate.wrappers.special_methods import OPERATORS, Methods, bound, class_with, special_methods

if TYPE_CHECKING:
    from nucleate.wrappers.equal_inputs import EqualInputs

#: Methods that a Lightning module runs instead of forward. They are forward methods without being marked.
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


@final
class ModuleWrapper(Delegating):
    """A wrapper of the user's model, with the same attributes, keys and methods, but another forward.

    It has the special methods of the model's class too: `wrapper[0]`, `len(wrapper)` or iteration work where they work
    with the model. Names and keys are those of the plain model, without `_orig_mod` and the like. A model that has no
    attribute `device` or `dtype` gets them: the device of this process, and the dtype of the first floating point
    parameter. The methods `training_step`, `validation_step`, `test_step` and `predict_step` go through precision and
    strategy as forward does.

    Args:
        forward_module: The module that the strategy's `setup` returned; its forward is called.
        original: The user's model, which may be the same object.
        precision: Converts inputs and outputs, and surrounds forward.
        strategy: Decides which methods must go through it.
        device: The device that is made current during forward; None does not change the current device.
        compiled: The user's model as it was given to `setup`. If `torch.compile` returned it, forward is compiled in
            the same way.
        live: The layout of the model, which is brought up to date before each forward that trains.
    """

    def __new__(cls, forward_module: nn.Module, original: nn.Module, *args: Any, **kwargs: Any) -> ModuleWrapper:
        """Make an object of the class that has the special methods of the model's class."""
        return _blank(special_methods(type(original)))

    def __init__(
        self,
        forward_module: nn.Module,
        original: nn.Module,
        precision: Precision,
        strategy: Strategy,
        device: torch.device | None = None,
        compiled: nn.Module | None = None,
        live: LiveLayout | None = None,
    ) -> None:
        super().__init__()
        # In `__dict__`, not in `_modules`: keys must not get a prefix. The registries are the model's own objects, so
        # that code which walks over modules without calling methods sees the same tree.
        self.__dict__.update(
            _forward_module=forward_module,
            _precision=precision,
            _strategy=strategy,
            _run_device=device,
            _live=live,
            _inputs=None,
            _forward_methods=set(),
            _inference_methods=set(),
            _forward_depth=0,
            _parameters=original._parameters,
            _buffers=original._buffers,
            _modules=original._modules,
            _non_persistent_buffers_set=original._non_persistent_buffers_set,
            _compiled=None,
            _original=original,
        )
        for name in _STEPS:
            if inspect.isfunction(getattr(type(original), name, None)):
                self.mark_forward_method(name)
        if compiled is not None and is_compiled(compiled):
            self.__dict__["_compiled"] = compiled_like(compiled, forward_module)

    @property
    def forward_module(self) -> nn.Module:
        """The module that the strategy's `setup` returned."""
        forward_module: nn.Module = self.__dict__["_forward_module"]
        return forward_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward with precision and strategy."""
        self._follow_changes()
        # Not `or`: a model whose class has `__len__` may be false.
        return self._run(self.forward_module if self._compiled is None else self._compiled, args, kwargs)

    def watch_inputs(self, inputs: EqualInputs) -> None:
        """Let the first training forwards warn if all ranks have the same inputs.

        Args:
            inputs: The search for equal inputs.
        """
        self.__dict__["_inputs"] = inputs

    def _follow_changes(self) -> None:
        """Refuse new parameters, and let the strategy exchange the gradients of those that were unfrozen."""
        live: LiveLayout | None = self._live
        if live is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        live.check()
        if live.take_change():
            self.__dict__["_forward_module"] = renewed = self._strategy.renew(self.module, self.forward_module)
            if self._compiled is not None:
                self.__dict__["_compiled"] = compiled_like(self._compiled, renewed)

    def mark_forward_method(self, method: str | MethodType) -> None:
        """Let a method of the model go through precision and strategy, as forward does.

        Args:
            method: The method's name, or the method itself.

        Raises:
            UsageError: The method is forward itself, or the model does not have the method.
        """
        name = method if isinstance(method, str) else method.__name__
        if name == "forward":
            raise UsageError("forward is always a forward method; mark_forward_method is for other methods.")
        if not inspect.ismethod(getattr(self.module, name, None)):
            raise UsageError(f"mark_forward_method({name!r}): {type(self.module).__name__} has no method of that name.")
        self._strategy.mark_forward_method(self.forward_module, name)
        self._forward_methods.add(name)

    def mark_inference_method(self, name: str) -> None:
        """Let a method that needs no gradients go through the precision, and through a strategy that gathers.

        Unlike a forward method, it does not enter a strategy that exchanges gradients, so a single rank may call it.

        Args:
            name: The name of a method of the model.
        """
        self._strategy.mark_forward_method(self.forward_module, name)
        self._inference_methods.add(name)

    def run_part(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forward of a part of a model that has no forward, as this wrapper's own forward."""
        if self._forward_depth:
            return forward(*args, **kwargs)
        self._follow_changes()
        return self._run(forward, args, kwargs)

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling() or CALLS.watch is None or self._forward_depth:
            return self._run_here(function, args, kwargs)
        if self._inputs is not None and self.training and torch.is_grad_enabled():
            inputs: EqualInputs = self._inputs
            if not inputs.look((args, kwargs)):
                self.__dict__["_inputs"] = None
        module, strategy = self.forward_module, self._strategy
        evaluates = not torch.is_grad_enabled() and not self.training
        with strategy.evaluation_context(module) if evaluates else nullcontext():
            if not strategy.exchanges("forward", module):
                return self._run_uncounted(function, args, kwargs)
            with CALLS.exchange("forward"):
                return self._run_here(function, args, kwargs)

    def _run_uncounted(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a forward that not every rank has to run. DDP exchanges the order of its buckets in the second one."""
        try:
            return self._run_here(function, args, kwargs)
        except Exception as error:
            explained = CALLS.explained(error, "forward")
            if explained is None:
                raise
            raise explained from explained.__cause__

    def _run_here(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        precision: Precision = self._precision
        args, kwargs = precision.convert_input((args, kwargs))
        self.__dict__["_forward_depth"] += 1
        try:
            with (
                nullcontext() if self._run_device is None else made_current(self._run_device),
                self._strategy.step_context(),
                precision.forward_context(),
            ):
                output = function(*args, **kwargs)
        except Exception as error:
            if self._forward_depth == 1:
                self._strategy.abandon(self.forward_module)
            self._raise_explained(error, getattr(function, "__name__", "forward"))
            raise
        finally:
            self.__dict__["_forward_depth"] -= 1
        if not self._forward_depth and not torch.is_grad_enabled():
            self._strategy.regain_shards(self.forward_module)
        output = precision.convert_output(output)
        if precision.scales_gradients and torch.is_grad_enabled():
            refuse_plain_backward(output)
        return output

    def _run_method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a marked method. If a strategy wraps the model, run the method inside the strategy's forward."""
        original = self.module
        self._follow_changes()
        if self.forward_module is original:
            return self._run(getattr(original, name), args, kwargs)
        own_forward = original.__dict__.get("forward")

        def restore() -> None:
            if own_forward is None:
                original.__dict__.pop("forward", None)
            else:
                original.__dict__["forward"] = own_forward

        def redirected(*args: Any, **kwargs: Any) -> Any:
            restore()  # First, because the method may call the real forward.
            return getattr(original, name)(*args, **kwargs)

        original.__dict__["forward"] = redirected
        try:
            return self._run(self.forward_module, args, kwargs)
        finally:
            restore()

    def _run_explained(self, method: MethodType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an unmarked method. The strategy may know better what an error means."""
        try:
            return method(*args, **kwargs)
        except Exception as error:
            self._raise_explained(error, method.__name__)
            raise

    def _raise_explained(self, error: Exception, method: str) -> None:
        explained = self._strategy.explain(error, self.module, method) or self._precision.explain(error, self.module)
        if explained is not None:
            raise explained from error

    def _run_guarded(self, method: MethodType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an unmarked method. If it calls forward of the model or of a part, refuse before that forward runs."""
        name = f"{type(self.module).__name__}.{method.__name__}"
        guarded: set[nn.Module] = set()

        def refuse(module: nn.Module, _: Any) -> None:
            # Without gradients there is nothing to exchange; inside the wrapper's forward the strategy is active.
            if not torch.is_grad_enabled() or self._forward_depth > 0:
                return
            if not guarded:
                guarded.update(self.module.modules())
            if module in guarded:
                raise UsageError(
                    f"{name}() calls forward by itself, which bypasses the strategy {self._strategy.name!r}: its "
                    f"gradients would not be exchanged. Call model.mark_forward_method({method.__name__!r}) after "
                    "setup, or call the method under torch.no_grad()."
                )

        handle = register_module_forward_pre_hook(refuse)
        try:
            return method(*args, **kwargs)
        finally:
            handle.remove()

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self.module.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_original" in self.__dict__:  # nn.Module.__init__ sets `training` before the wrapper has a model.
            self.module.training = mode

    def __getattr__(self, name: str) -> Any:
        if "_original" not in self.__dict__:  # While unpickling.
            raise AttributeError(name)
        try:
            value = getattr(self.module, name)
        except AttributeError:
            # A property of the model that fails keeps its own error.
            if name not in _GIVEN or hasattr(type(self.module), name):
                raise
            return _GIVEN[name](self)
        return self._routed(name, value)

    def _routed(self, name: str, value: Any) -> Any:
        """Return an attribute of the model; a method goes through precision and strategy as far as it has to."""
        if name in self.__dict__["_forward_methods"]:
            return functools.wraps(value)(lambda *args, **kwargs: self._run_method(name, args, kwargs))
        if name in self.__dict__["_inference_methods"]:
            return functools.wraps(value)(lambda *args, **kwargs: self._run(value, args, kwargs))
        if inspect.ismethod(value) and value.__self__ is self.module:
            if self._strategy.guards_methods(self.forward_module):
                return functools.wraps(value)(lambda *args, **kwargs: self._run_guarded(value, args, kwargs))
            if self._strategy.shards:
                return functools.wraps(value)(lambda *args, **kwargs: self._run_explained(value, args, kwargs))
        return value

    def _call_special(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a special method of the model, such as `__getitem__`.

        Args:
            name: The name of the method.
            args: Positional arguments.
            kwargs: Keyword arguments.
        """
        model = self.module
        if name in OPERATORS:
            args = tuple(arg.module if isinstance(arg, ModuleWrapper) else arg for arg in args)
        result = self._routed(name, bound(model, name))(*args, **kwargs)
        return self if result is model else result

    def __setattr__(self, name: str, value: Any) -> None:
        if "_original" not in self.__dict__ or name in self.__dict__ or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            setattr(self.module, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            object.__delattr__(self, name)
        else:
            delattr(self.module, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.module), *_GIVEN})  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # By the names of the special methods, because the class of this object has no name of its own.
        return _blank, (special_methods(type(self.module)),), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out compiled code, as `nn.Module` does: it cannot be pickled."""
        return {**self.__dict__, "_compiled": None, "_compiled_call_impl": None, "_live": None, "_inputs": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleWrapper:
        """Copy the model, but keep the same precision and strategy, as an average of weights needs it."""
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        for plugin in (self._precision, self._strategy):
            memo[id(plugin)] = plugin
        # First the model: a strategy may copy it in a way of its own, which makes other registries and parameters.
        copy.deepcopy(self.module, memo)
        # Compiled code belongs to the weights that it was compiled for.
        clone.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        if self._compiled is not None:
            clone.__dict__["_compiled"] = compiled_like(self._compiled, clone.forward_module)
        if self._live is not None:
            shown = shown_by(self._strategy, clone.forward_module)
            clone.__dict__["_live"] = self._live.of_copy(inside(clone.module), shown)
        return clone

    def __copy__(self) -> ModuleWrapper:
        """Return another wrapper of the same model."""
        clone = object.__new__(type(self))
        clone.__dict__.update({**self.__getstate__(), "_compiled": self._compiled, "_live": self._live})
        return clone

    def __repr__(self) -> str:
        return f"ModuleWrapper({self.module!r})"


def _blank(methods: Methods) -> ModuleWrapper:
    wrapper: ModuleWrapper = object.__new__(class_with(ModuleWrapper, methods))
    return wrapper


def _dtype(wrapper: ModuleWrapper) -> torch.dtype:
    tensors = (*wrapper.module.parameters(), *wrapper.module.buffers())
    precision: Precision = wrapper._precision
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), precision.dtype)


def _device(wrapper: ModuleWrapper) -> torch.device:
    if wrapper._run_device is not None:
        device: torch.device = wrapper._run_device
        return device
    tensors = (*wrapper.module.parameters(), *wrapper.module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


# Attributes for models that do not have them.
_GIVEN: dict[str, Callable[[ModuleWrapper], Any]] = {"device": _device, "dtype": _dtype}

for _name in LOOKS:
    setattr(ModuleWrapper, _name, look(getattr(ModuleWrapper, _name)))


def refuse_set_up(model: nn.Module, models: Container[nn.Module]) -> None:
    """Refuse an object that is not a module, and a model that was set up or has a part that was set up.

    Args:
        model: The argument of `setup`.
        models: The original models that were set up, without shells.

    Raises:
        UsageError: The object is not a module, or it or a part was set up before.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"setup takes a torch.nn.Module first, then optimizers; got {type(model).__name__}.")
    if isinstance(inside(model, ModuleWrapper), ModuleWrapper) or inside(model) in models:
        raise UsageError(
            f"this {type(inside(model)).__name__} has been set up already. Use the model that `setup` returned."
        )
    # A wrapper in the tree appears as the model that it wraps.
    found = [name for name, module in named_modules(model) if module in models]
    if found:
        raise UsageError(f"{name_list(found)} of this model has been set up already. Set up the whole model once.")
