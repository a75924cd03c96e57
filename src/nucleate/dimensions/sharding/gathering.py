"""Gathered parameters of one sharded model: when FSDP gathers them, what code sees meanwhile, and when it frees them.

FSDP2 puts gathered parameters in the place of the shards, and takes them out by its own rules: after the forward of an
inner unit, but after the backward of the root. These rules are for a loop of forward and backward alone. This file adds
the hooks that other uses need. They stand around FSDP's own hooks on each unit.

- The root is initialized first, and outside of inference mode, whichever part runs first in whichever mode.
- A forward gathers the shards as they are now, even if an earlier forward without a backward has left gathered
  parameters.
- A backward that makes a graph (`create_graph=True`) keeps all parameters for the next one; see `second_backward.py`.

It reads private attributes of FSDP2 (torch/distributed/fsdp/_fully_shard/_fsdp_state.py, _fsdp_param_group.py and
_fsdp_param.py, 2.13).
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from nucleate.dimensions.sharding.explanation import explain_backward
from nucleate.dimensions.sharding.outputs import hidden_tensors, tensors_for_fsdp
from nucleate.dimensions.sharding.second_backward import SecondBackward

#: The attribute of a unit that holds its gathering.
KEY = "_nucleate_gathering"
#: The gatherings of this process: a backward has no model of its own.
_LIVING: weakref.WeakSet[Gathering] = weakref.WeakSet()
#: The beginnings of the names of attributes that torch and this package set on parameters.
_OWN_ATTRIBUTES = ("_nucleate", "_fsdp_orig_uid", "_is_param")


def follow_units(model: nn.Module) -> None:
    """Make a gathering for each outermost unit of a model, whoever has called `fully_shard`, unless it has one.

    Args:
        model: The model, with values in all its tensors.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    seen, left = set[nn.Module](), [model]
    while left:
        module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        if not isinstance(module, FSDPModule):
            left.extend(module.children())
        elif gathering_of(module) is None:
            Gathering(module)


def gathering_of(module: nn.Module) -> Gathering | None:
    """Return the gathering of a module that is a unit, else None."""
    found: Gathering | None = vars(module).get(KEY)
    return found


def gatherings_in(module: nn.Module) -> list[Gathering]:
    """Return the gathering of a module that is a unit; else those of the outermost units inside."""
    found = gathering_of(module)
    if found is not None:
        return [found]
    return list({id(g): g for part in module.modules() if (g := gathering_of(part)) is not None}.values())


def abandon_backward(error: Exception) -> Exception | None:
    """Forget the backwards that have begun and not ended, after one has failed.

    Args:
        error: The error that it raised.

    Returns:
        An error that names the gradients that could not be exchanged, or None for an error of another kind.
    """
    explained = None
    for gathering in [gathering for gathering in _LIVING if gathering.is_busy]:
        names = {id(parameter): name for name, parameter in gathering.named_shards()}
        explained = explained or explain_backward(error, names)
        gathering.abandon(in_backward=True)
    return explained


def shards_shown(module: nn.Module) -> AbstractContextManager[None] | None:
    """Return a context with shards in the place of gathered parameters, or None if nothing is gathered.

    Nothing is freed and nothing is exchanged, so a single rank may enter the context at any time.

    Args:
        module: A unit, or a module with units inside.
    """
    groups = [group for gathering in gatherings_in(module) for group in gathering.groups if not group.is_sharded]
    return _shown(groups) if groups else None


class Gathering:
    """The units of one sharded model, and hooks on them.

    Args:
        root: The model, after `fully_shard`, with values in all its tensors.
    """

    def __init__(self, root: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule

        _LIVING.add(self)
        self._root = weakref.ref(root)
        #: The units and the root, by FQN, outermost first.
        self.units: dict[str, Any] = {name: m for name, m in root.named_modules() if isinstance(m, FSDPModule)}
        #: The names of methods that gather parameters as forward does.
        self.marked: set[str] = set()
        #: FSDP's parameter groups.
        self.groups = [group for module in self.units.values() for group in _state_of(module)._fsdp_param_groups]
        # FSDP's state of each unit, and a parameter of each of its groups: a change of the dtype changes all parameters
        # that have a floating point dtype.
        states = [_state_of(module) for module in self.units.values()]
        self._states = {id(m): (state, _samples(state)) for m, state in zip(self.units.values(), states, strict=True)}
        # Units that have not been gathered yet.
        self._fresh = {id(module) for module in self.units.values()}
        # The number of marked methods that run now: a method may call forward several times.
        self._num_methods = 0
        self._second_backward = SecondBackward(self.groups, self._root, self.reshard)
        # torch.compile must not trace these hooks, as it does not trace those of FSDP.
        before, after = map(torch.compiler.disable, (self.before_forward, self.after_forward))
        for module in self.units.values():
            vars(module)[KEY] = self
            module.register_forward_pre_hook(before, prepend=True)
            module.register_forward_hook(after)
            state, _ = self._states[id(module)]
            # FSDP's hook on the outputs of a unit. A second hook on each output would take longer.
            state._pre_backward = functools.partial(self._before_backward, state._pre_backward)

    @property
    def root(self) -> Any:
        """The model, or None if nobody uses the whole model any more."""
        return self._root()

    def named_shards(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the sharded parameters by FQN, also those that are gathered now."""
        root = self.root
        names = {} if root is None else {id(module): name for name, module in root.named_modules()}
        for group in self.groups:
            for param in group.fsdp_params:
                prefix = names.get(id(param._module_info.module), "")
                yield f"{prefix}.{param._module_info.param_name}".lstrip("."), param.sharded_param

    # -- hooks ---------------------------------------------------------------------------------------------

    def before_forward(self, module: Any, _: Any = None) -> None:
        """Prepare the forward of a unit, before FSDP gathers its parameters."""
        if _in_backward():
            return  # Checkpointing repeats a forward, whose parameters the backward has gathered.
        state, samples = self._states[id(module)]
        if state._is_root is None:
            # FSDP takes the module that runs first for the root, and later refuses the real one.
            root = self.root
            with torch.inference_mode(False), torch.no_grad():
                (state if root is None else _state_of(root))._lazy_init()
        if state._state_ctx.iter_forward_root is None:
            self._renew_gathered()
        for param in samples:
            if param.sharded_param.dtype is not param.orig_dtype:
                self._forget_tensors(module, state)
        if id(module) in self._fresh:
            self._fresh.discard(id(module))
            self._first_gather(module, state)

    def after_forward(self, module: Any, _: Any, output: Any) -> None:
        """Prepare the backward of a unit, after FSDP has done so. If there will be none, free what FSDP has kept."""
        state, _ = self._states[id(module)]
        if torch.is_grad_enabled() and not isinstance(output, Tensor) and not _in_backward():
            for tensor in hidden_tensors(output):
                # A leaf, such as a parameter that forward returns, would keep the hook forever.
                if not tensor.is_leaf:
                    tensor.register_hook(state._pre_backward)
        if not self._num_methods and state._state_ctx.iter_forward_root is None:
            self._regain_after(output)

    def _regain_after(self, output: Any) -> None:
        # A forward may disable gradients by itself, and `generate` of many models does.
        if not torch.is_grad_enabled() or not (tensors_for_fsdp(output) or hidden_tensors(output)):
            self.regain()

    def _before_backward(self, hook: Callable[[Tensor], Tensor], gradient: Tensor) -> Tensor:
        """Prepare the backward of a unit, then run FSDP's hook."""
        if not torch._C._are_functorch_transforms_active():
            self._second_backward.before_backward()
        return hook(gradient)

    # -- the form that code sees ---------------------------------------------------------------------------

    def regain(self) -> None:
        """Free gathered parameters, and put the shards in their place. Every rank must call this."""
        if not self._second_backward.is_pending and not _in_backward():
            self.reshard()

    def reshard(self) -> None:
        """Free all gathered parameters."""
        if not all(group.is_sharded for group in self.groups):
            for module in self.units.values():
                module.reshard()

    def mark(self, name: str) -> None:
        """Let a method of the model gather parameters as forward does."""
        from torch.distributed.fsdp import register_fsdp_forward_method

        root = self.root
        if root is None or name in self.marked:
            return
        method = getattr(root, name)
        register_fsdp_forward_method(root, name)
        gathered = getattr(root, name)

        @functools.wraps(method)
        def outer(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.before_forward(module)
            self._num_methods += 1
            try:
                output = gathered(*args, **kwargs)
            finally:
                self._num_methods -= 1
            self.after_forward(module, args, output)
            return output

        setattr(root, name, MethodType(outer, root))
        self.marked.add(name)

    # -- failures ------------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether a forward or backward has begun and has not ended."""
        from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

        return any(_state_of(module)._training_state != TrainingState.IDLE for module in self.units.values())

    def abandon(self, in_backward: bool = False) -> None:
        """Forget a forward or backward that has failed, so that the next one begins as if it had not been.

        Args:
            in_backward: Whether a backward has failed, so that its gradients are not complete.
        """
        self._second_backward.release()
        for param in (param for group in self.groups for param in group.fsdp_params) if in_backward else ():
            param.unsharded_accumulated_grad = None
            if hasattr(param, "_unsharded_param"):
                param.unsharded_param.grad = None
        root = self.root
        if root is not None and _state_of(root)._is_root:
            root.reset_iter_state()

    # -- inside --------------------------------------------------------------------------------------------

    def _renew_gathered(self) -> None:
        """Free what an earlier forward has left gathered: the shards may have changed since."""
        # A second backward needs what its graph uses, also the units that this forward does not run.
        needed = [m for m in self.units.values() if _is_gathered(m)] if self._second_backward.is_pending else []
        self.reshard()
        for module in needed:
            module.unshard()

    def _first_gather(self, module: Any, state: Any) -> None:
        """Gather a unit for the first time. This makes the tensors into which all later forwards gather.

        In inference mode they would be tensors that cannot be trained. FSDP does not give them the attributes that
        users have set on parameters.
        """
        params = [param for group in state._fsdp_param_groups for param in group.fsdp_params]
        attributes = [user_attributes(param.sharded_param) for param in params]
        if torch.is_inference_mode_enabled() or any(attributes):
            with torch.inference_mode(False), torch.no_grad():
                module.unshard()
            for param, values in zip(params, attributes, strict=True):
                vars(param.unsharded_param).update(values)

    def _forget_tensors(self, module: Any, state: Any) -> None:
        """Drop the tensors into which a unit has gathered, because its parameters have another dtype now."""
        for group in state._fsdp_param_groups:
            for param in group.fsdp_params:
                param.all_gather_outputs = []
                vars(param).pop("_unsharded_param", None)
            group._init_mp_dtypes()
        self._fresh.add(id(module))


def user_attributes(parameter: nn.Parameter) -> dict[str, Any]:
    """Return the attributes that users have set on a parameter, without those of torch and of this package."""
    return {key: value for key, value in vars(parameter).items() if not key.startswith(_OWN_ATTRIBUTES)}


@contextmanager
def _shown(groups: list[Any]) -> Iterator[None]:
    held = []
    for group in groups:
        for param in group.fsdp_params:
            held.append((group, param, getattr(param._module_info.module, param._module_info.param_name)))
            param._setattr_on_modules(param.sharded_param)
    try:
        yield
    finally:
        for group, param, registered in held:
            # FSDP itself frees the parameters before it makes a state dict.
            if not group.is_sharded:
                param._setattr_on_modules(registered)


def _state_of(module: Any) -> Any:
    return module._get_fsdp_state()


def _samples(state: Any) -> list[Any]:
    floating = [
        [p for p in group.fsdp_params if p.sharded_param.is_floating_point()] for group in state._fsdp_param_groups
    ]
    return [params[0] for params in floating if params]


def _is_gathered(module: Any) -> bool:
    return any(group.is_unsharded for group in _state_of(module)._fsdp_param_groups)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
