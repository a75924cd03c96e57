"""Compiling again: a model that `torch.compile` returned is set up without the compiled module around it.

A strategy lays out the user's model and knows nothing of compilers. The module that the strategy returns is compiled
with the backend and the options of the user's call.
"""

from __future__ import annotations

from torch import nn

from nucleate.shells import is_compiled

# The hooks that a user may have registered on the compiled module (torch/nn/modules/module.py, 2.13).
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


def compiled_like(compiled: nn.Module, module: nn.Module) -> nn.Module:
    """Return a module compiled as another one is; unchanged if the other one is not compiled.

    Args:
        compiled: The module whose backend, options and hooks count.
        module: The module to compile.
    """
    if not is_compiled(compiled):
        return module
    again: nn.Module = compiled.dynamo_ctx(module)  # type: ignore[operator]
    again.__dict__.update({name: compiled.__dict__[name] for name in _HOOKS if name in compiled.__dict__})
    return again
