"""The parameters that FSDP2 cannot shard, which are refused by name before any change."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from nucleate.errors import ConfigurationError, name_list
from nucleate.shells import named_parameters


def refuse_unshardable(model: nn.Module, units: list[tuple[str, nn.Module]]) -> None:
    """Refuse a model with parameters that FSDP2 cannot shard.

    Args:
        model: The model. Its deferred tensors appear as meta tensors.
        units: The modules that become units, innermost first, without the root.

    Raises:
        ConfigurationError: A parameter cannot be sharded; the message gives its FQN.
    """
    parameters = dict(named_parameters(model))
    strided = [name for name, p in parameters.items() if not p.is_contiguous()]
    if strided:
        raise ConfigurationError(
            f"FSDP cannot shard parameters that are not contiguous: {name_list(strided)}. Make them contiguous in the "
            "constructor, or use strategy='ddp'."
        )
    hooked = [name for name, p in parameters.items() if p._backward_hooks]
    if hooked:
        raise ConfigurationError(
            f"{name_list(hooked)} have hooks on their gradient (`register_hook`), which FSDP never calls. Use "
            "`register_post_accumulate_grad_hook`, which FSDP calls, or strategy='ddp'."
        )
    owner = {id(p): name for name, unit in [("", model), *reversed(units)] for p in unit.parameters()}
    dtypes: dict[str, dict[torch.dtype, str]] = {}
    for name, parameter in parameters.items():
        # Frozen parameters may have any dtype: only gradients must have the same dtype
        # (`FSDPParamGroup._init_mp_dtypes` in torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py, 2.13). Each
        # parameter is gathered as bytes.
        if parameter.requires_grad and parameter.dim() > 0:
            dtypes.setdefault(owner[id(parameter)], {}).setdefault(parameter.dtype, name)
    for unit_name, found in dtypes.items():
        if len(found) > 1:
            listed = ", ".join(f"{name} is {dtype}" for dtype, name in found.items())
            raise ConfigurationError(
                "the trained parameters of one FSDP unit must have one dtype, but in "
                f"{unit_name or 'the root'} {listed}. Cast them to one dtype, freeze those of one dtype, or name a "
                "module that holds only one dtype in `wrap`."
            )
    _refuse_shared_memory(parameters)


def _refuse_shared_memory(parameters: dict[str, nn.Parameter]) -> None:
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for name, parameter in parameters.items():
        start = int(parameter.storage_offset()) * parameter.element_size()
        size = parameter.numel() * parameter.element_size()
        if size:
            spans.setdefault(parameter.untyped_storage()._cdata, []).append((start, size, name))
    for found in spans.values():
        for (start, size, first), (following, _, second) in pairwise(sorted(found)):
            if start + size > following:
                raise ConfigurationError(
                    f"{first} and {second} are different parameters that share memory, which shards cannot do. Tie "
                    "them by assigning the same parameter, or use strategy='ddp'."
                )
