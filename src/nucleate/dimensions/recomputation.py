"""Activation checkpointing: modules whose forward runs a second time in backward, so that no activation is kept.

The names of a model do not change, because this file replaces the `forward` of a module, not the module. The second
forward computes the same bits as the first. torch's `checkpoint` restores autocast and the CPU's random numbers for it.
This file also restores the device's random numbers, the default dtype, and the buffers that forward changes.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nucleate.devices import default_generator
from nucleate.dimensions.module_policy import ModulePolicy, select
from nucleate.dimensions.parts import has_forward
from nucleate.errors import ConfigurationError
from nucleate.shells import inside, named_modules

#: The name of the strategies' argument.
OPTION = "activation_checkpointing_policy"
# torch 2.13: torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py
_TORCHS_WRAPPER = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper"


def find_checkpointed(model: nn.Module, policy: ModulePolicy) -> list[nn.Module]:
    """Return the modules whose activations a policy does not keep.

    The root and containers without a forward are not among them, nor modules that torch's `checkpoint_wrapper` has
    wrapped already.

    Args:
        model: The model.
        policy: The policy.

    Raises:
        ConfigurationError: The policy is invalid, or it chooses a module of TorchScript.
    """
    chosen, wrapped, found = select(model, policy, OPTION), set[int](), dict[int, nn.Module]()
    for name, module in named_modules(model):
        if _is_wrapper(module):
            wrapped.add(id(inside(module)))
        elif name and name in chosen and inside(module) is module and has_forward(module) and id(module) not in wrapped:
            if isinstance(module, torch.jit.ScriptModule):
                raise ConfigurationError(
                    f"{OPTION} chooses {name}, a module of TorchScript, whose forward cannot run in parts. Choose "
                    "other modules, or give the model the module that was scripted."
                )
            found[id(module)] = module
    return list(found.values())


def checkpoint_activations(modules: list[nn.Module], device: torch.device) -> None:
    """Let modules compute their activations a second time in backward. A module that does so already stays as it is.

    Args:
        modules: The modules.
        device: The device that they run on.
    """
    for module in modules:
        if not isinstance(vars(module).get("forward"), CheckpointedForward):
            vars(module)["forward"] = CheckpointedForward(module, device, vars(module).get("forward"))


class CheckpointedForward:
    """The forward of a module that keeps no activations.

    Args:
        module: The module. Only a weak reference is kept, so that a model that nobody uses is freed at once.
        device: The device that the module runs on.
        own: The forward that was set on the module itself, if there is one.
    """

    def __init__(self, module: nn.Module, device: torch.device, own: Callable[..., Any] | None = None) -> None:
        self._module = weakref.ref(module)
        self._device = device
        self._own = own
        # The buffers that forward has changed, by the `training` flags of all modules inside.
        self._changing: dict[tuple[bool, ...], set[tuple[str, str]]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run forward, and keep only what a second run in backward needs."""
        forward = self._forward
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        names = tuple(kwargs)

        def run(*values: Any) -> Any:
            first = len(values) - len(names)
            return forward(*values[:first], **dict(zip(names, values[first:], strict=True)))

        # torch keeps tensors that it gets by position as autograd's own, which notices a change in place.
        values = (*args, *kwargs.values())
        if torch.compiler.is_compiling():  # torch's compiler takes no contexts (`checkpoint`, 2.13).
            return checkpoint(run, *values, use_reentrant=False)
        return checkpoint(run, *values, use_reentrant=False, context_fn=self._contexts)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._forward)

    @property
    def _forward(self) -> Callable[..., Any]:
        if self._own is not None:
            return self._own
        module = self._module()
        if module is None:
            raise ReferenceError("the module of this forward has been freed; keep a reference to the model.")
        forward: Callable[..., Any] = type(module).forward.__get__(module)
        return forward

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the context of the first forward, and that of the second."""
        module = self._module()
        assert module is not None
        flags = tuple(part.training for part in module.modules())
        before = _Before(module, self._device, self._changing.get(flags))

        @contextmanager
        def first() -> Iterator[None]:
            yield
            self._changing.setdefault(flags, set()).update(before.keep_changed())

        return first(), before

    def __deepcopy__(self, memo: dict[int, Any]) -> CheckpointedForward:
        """Return the forward of the module's copy, which is in the memo."""
        original = self._module()
        module: Any = memo.get(id(original), original)
        return CheckpointedForward(module, self._device, copy.deepcopy(self._own, memo))

    def __reduce__(self) -> Any:
        return CheckpointedForward, (self._module(), self._device, self._own)


class _Before:
    """The state before a forward that the same forward needs to compute the same bits again.

    The object is the context of the second forward. A graph that is kept may run that forward again and again.

    Args:
        module: The module.
        device: The device that it runs on.
        changing: The names of the buffers that forward changes; None keeps a copy of each buffer until `keep_changed`.
    """

    def __init__(self, module: nn.Module, device: torch.device, changing: set[tuple[str, str]] | None) -> None:
        self._module = module
        self._stack = ExitStack()
        self._dtype = torch.get_default_dtype()
        self._generator = None if device.type == "cpu" else default_generator(device)
        self._state = None if self._generator is None else self._generator.get_state()
        self._is_first = changing is None
        self._versions = {place: (buffer, buffer._version) for place, buffer in _buffers(module)}
        self._copies = {
            place: buffer.detach().clone()
            for place, (buffer, _) in self._versions.items()
            if changing is None or place in changing
        }

    def keep_changed(self) -> set[tuple[str, str]]:
        """Forget the copies of the buffers that forward did not change, and return the names of the others."""
        now = dict(_buffers(self._module))
        changed = {
            place
            for place, (buffer, version) in self._versions.items()
            if now.get(place) is not buffer or buffer._version != version or self._differs(place, buffer)
        }
        self._versions.clear()
        self._copies = {place: held for place, held in self._copies.items() if place in changed}
        return changed

    def _differs(self, place: tuple[str, str], buffer: Tensor) -> bool:
        """Return whether a buffer with a copy has other values. The first forward finds this out for the later ones.

        The kernels of batch norm change its running statistics without a new version (torch 2.13).
        """
        if place not in self._copies:
            return False
        try:
            return not self._is_first or not torch.equal(buffer, self._copies[place])
        except (RuntimeError, NotImplementedError):  # Some dtypes cannot be compared.
            return True

    def __enter__(self) -> None:
        self._stack.enter_context(self._restored())

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Put this state into the place of the present one, and the present one back at the end."""
        modules = dict(self._module.named_modules())
        # Forward changes copies: the buffers themselves have changed once already.
        held = {(path, name): modules[path]._buffers[name] for path, name in self._copies}
        generator, state = self._generator, None if self._generator is None else self._generator.get_state()
        with nullcontext() if torch.get_default_dtype() is self._dtype else _default_dtype(self._dtype):
            try:
                for (path, name), buffer in self._copies.items():
                    modules[path]._buffers[name] = buffer.clone()
                if generator is not None and self._state is not None:
                    generator.set_state(self._state)
                yield
            finally:
                for (path, name), found in held.items():
                    modules[path]._buffers[name] = found
                if generator is not None and state is not None:
                    generator.set_state(state)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _buffers(module: nn.Module) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Yield the buffers of a module and of the modules inside, each with the module's path and the buffer's name."""
    for path, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_inference():
                yield (path, name), buffer


def _is_wrapper(module: nn.Module) -> bool:
    return any(f"{base.__module__}.{base.__qualname__}" == _TORCHS_WRAPPER for base in type(module).__mro__)
