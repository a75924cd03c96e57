"""Inference tensors in a model, which a model holds after construction in `torch.inference_mode()`.

Nothing can train them, and outside of inference mode nothing may write to them. So `setup` puts ordinary tensors on the
same memory in their place, whatever the way by which they came into the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nucleate.deferred import held_tensors, ordinary
from nucleate.materialize.installation import install
from nucleate.materialize.plan import Holder
from nucleate.materialize.vacancies import refuse_recording
from nucleate.shells import named_modules


def replace_inference_tensors(model: nn.Module) -> None:
    """Give every inference tensor of a model an ordinary content with the same memory, values and attributes.

    The tensor objects stay the same, so that ties and optimizers stay valid. Where torch refuses that, all places of
    the model get a new object.

    Args:
        model: The model. Its deferred tensors are not inference tensors.

    Raises:
        UsageError: The model is being constructed.
    """
    refuse_recording()
    places: list[tuple[nn.Module, str, str, Tensor]] = []
    barren = set[int]()
    with torch._C.DisableTorchFunctionSubclass():
        for module in model.modules():
            for kind, name, tensor in held_tensors(module, barren):
                if tensor.is_inference() and not is_lazy(tensor):
                    places.append((module, kind, name, tensor))
    if not places:
        return
    prefixes = {module: f"{name}." if name else "" for name, module in named_modules(model)}
    found: dict[int, tuple[Tensor, list[Holder]]] = {}
    for module, kind, name, tensor in places:
        holder = Holder(module, kind, name, f"{prefixes.get(module, '')}{name}")
        found.setdefault(id(tensor), (tensor, []))[1].append(holder)
    recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    for module in recurrent:
        # `swap_tensors` refuses tensors with weak references, which these modules keep (torch/nn/modules/rnn.py).
        module._flat_weight_refs = []
    for tensor, holders in found.values():
        install(tensor, type(tensor), holders, ordinary(tensor))
    for module in recurrent:
        module._init_flat_weights()
