"""Lazy modules, such as `nn.LazyLinear`, whose parameters get their shapes from the first input.

Before that input nothing can be sharded, exchanged or trained: no strategy of several ranks can take such a model. One
device could, but a script that works on one device has to work on many. So `setup` refuses such a model everywhere.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nucleate.errors import UninitializedError, name_list
from nucleate.shells import named_modules


def refuse_uninitialized(model: nn.Module) -> None:
    """Refuse a model with parameters or buffers that have no shape yet.

    Raises:
        UninitializedError: The model has such parameters or buffers; the message gives their FQNs.
    """
    lazy = {module for module in model.modules() if any(map(_is_lazy, _tensors(module).values()))}
    if not lazy:
        return
    found = {
        f"{prefix}.{name}" if prefix else name: type(module).__name__
        for prefix, module in named_modules(model)
        if module in lazy
        for name, tensor in _tensors(module).items()
        if _is_lazy(tensor)
    }
    raise UninitializedError(
        f"{name_list(found)} have no shape yet. Lazy modules ({name_list(dict.fromkeys(found.values()))}) take it from "
        "their first input. Call the model once with an example batch inside the `init_module` block, before `setup`: "
        "`model(batch)`. Or load weights before `setup`, which gives them their shapes as well."
    )


def _tensors(module: nn.Module) -> dict[str, Tensor | None]:
    return {**module._parameters, **module._buffers}


def _is_lazy(tensor: Tensor | None) -> bool:
    return tensor is not None and is_lazy(tensor)
