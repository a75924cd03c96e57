"""Lazy modules, such as `nn.LazyLinear`, whose parameters get their shapes from the first input.

Before that input nothing can be sharded, exchanged or trained: no strategy of several ranks can take such a model. One
device could, but a script that works on one device has to work on many. So `setup` refuses such a model everywhere.
"""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from nucleate.errors import UninitializedError, name_list
from nucleate.shells import named_modules


def refuse_uninitialized(model: nn.Module) -> None:
    """Refuse a model with parameters or buffers that have no shape yet.

    Raises:
        UninitializedError: The model has such parameters or buffers; the message gives their FQNs.
    """
    found: dict[str, str] = {}
    for prefix, module in named_modules(model):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and is_lazy(tensor):
                found[f"{prefix}.{name}" if prefix else name] = type(module).__name__
    if found:
        classes = name_list(dict.fromkeys(found.values()))
        raise UninitializedError(
            f"{name_list(found)} have no shape yet. Lazy modules ({classes}) take it from their first input. Call the "
            "model once with an example batch inside the `init_module` block, before `setup`: `model(batch)`. Or load "
            "weights before `setup`, which gives them their shapes as well."
        )
