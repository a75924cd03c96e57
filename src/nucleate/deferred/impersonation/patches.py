"""Patches of torch, installed while any thread records. They act for the recordings of the calling thread.

torch's modes do not see everything that a constructor does with modules, parameters and initializers. The patches are
installed for the whole process as long as at least one context is open. In threads that do not record they do nothing.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from nucleate.deferred.active import active_records
from nucleate.deferred.impersonation.legacy_types import install_legacy
from nucleate.deferred.impersonation.threads import install_threads
from nucleate.deferred.recording.generator_states import install_states
from nucleate.deferred.torch_modes import plain_modes

_lock = threading.Lock()
_installed = ExitStack()
_num_contexts = 0


@contextmanager
def patched() -> Iterator[None]:
    """Keep torch patched inside the context. The last context to end removes the patches, in whichever thread it is."""
    global _num_contexts
    with _lock:
        if _num_contexts == 0:
            _install(_installed)
        _num_contexts += 1
    try:
        yield
    finally:
        with _lock:
            _num_contexts -= 1
            if _num_contexts == 0:
                _installed.close()


def _install(stack: ExitStack) -> None:
    install_legacy(stack)
    install_states(stack)
    install_threads(stack)
    for hook in (
        nn_module.register_module_parameter_registration_hook(_notice),
        nn_module.register_module_buffer_registration_hook(_notice),
        nn_module.register_module_module_registration_hook(_notice_both),
    ):
        stack.callback(hook.remove)

    # `deepcopy` and `torch.load` make modules without calling the registration hooks.
    set_state = nn.Module.__setstate__

    def noticed_set_state(module: nn.Module, state: dict[str, Any]) -> None:
        _notice(module)
        set_state(module, state)  # type: ignore[no-untyped-call]

    nn.Module.__setstate__ = noticed_set_state  # type: ignore[method-assign]
    stack.callback(setattr, nn.Module, "__setstate__", set_state)

    # Scripted and traced modules do not call the hooks either.
    scripted: Any = torch.jit._script.RecursiveScriptModule
    init_scripted = scripted.__init__

    def noticed_init_scripted(module: nn.Module, *args: Any) -> None:
        init_scripted(module, *args)
        _notice(module)

    scripted.__init__ = noticed_init_scripted
    stack.callback(setattr, scripted, "__init__", init_scripted)

    # A rejection loop: only a run tells how many random numbers it uses. The public function looks this name up in its
    # module at each call, so the patch also reaches code that imported `trunc_normal_`.
    trunc_normal = torch.nn.init._no_grad_trunc_normal_

    def opaque_trunc_normal(
        tensor: Tensor, mean: float, std: float, a: float, b: float, generator: torch.Generator | None = None
    ) -> Tensor:
        for record in reversed(active_records()):
            if record.holds(tensor):
                with plain_modes():
                    # It refuses wrong numbers even on zero elements, but needs one element to refuse a wrong dtype.
                    numel = 0 if tensor.dtype.is_floating_point else 1
                    trunc_normal(torch.empty(numel, dtype=tensor.dtype), mean, std, a, b, torch.Generator())
                return record.opaque(trunc_normal, tensor, (mean, std, a, b), generator)
        return trunc_normal(tensor, mean, std, a, b, generator)

    torch.nn.init._no_grad_trunc_normal_ = opaque_trunc_normal
    stack.callback(setattr, torch.nn.init, "_no_grad_trunc_normal_", trunc_normal)

    # The recording keeps the tensors of a state dict by reference, but clones a constructor's small constants.
    load_state_dict = nn.Module.load_state_dict

    @functools.wraps(load_state_dict)
    def loaded_by_reference(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as loading:
            for record in active_records():
                loading.enter_context(record.loading())
            return load_state_dict(module, *args, **kwargs)

    nn.Module.load_state_dict = loaded_by_reference  # type: ignore[method-assign, assignment]
    stack.callback(setattr, nn.Module, "load_state_dict", load_state_dict)

    # `nn.Parameter` calls this, and no mode sees it. The result shares the tensor's memory, but has its own version
    # counter.
    make_subclass = torch.Tensor._make_subclass

    def noticed_make_subclass(*args: Any, **kwargs: Any) -> Tensor:
        made: Tensor = make_subclass(*args, **kwargs)
        for record in active_records():
            record.notice_parameter(made)
        return made

    torch.Tensor._make_subclass = staticmethod(noticed_make_subclass)  # type: ignore[method-assign, assignment]
    # `Tensor` inherits the original from a C class, so deleting the patch restores it.
    stack.callback(delattr, torch.Tensor, "_make_subclass")

    # `module.to(tensor)` reads the tensor's device in C++.
    move = nn.Module.to

    def move_to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        other = kwargs.get("tensor", args[0] if args else None)
        if isinstance(other, Tensor) and any(record.holds(other) for record in active_records()):
            rest = {name: value for name, value in kwargs.items() if name != "tensor"}
            return move(module, other.device, other.dtype, *args[1:], **rest)
        return move(module, *args, **kwargs)

    nn.Module.to = move_to  # type: ignore[method-assign, assignment]
    stack.callback(setattr, nn.Module, "to", move)


def _notice(module: nn.Module, name: str = "", value: Any = None) -> None:
    for record in active_records():
        record.notice(module)


def _notice_both(module: nn.Module, name: str, value: Any) -> None:
    _notice(module)
    if isinstance(value, nn.Module):
        _notice(value)
