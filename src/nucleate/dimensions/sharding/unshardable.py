"""The models and parameters that FSDP2 cannot shard, which are refused by name before any change."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from nucleate.dimensions.sharding.explanation import sparse_gradients
from nucleate.errors import ConfigurationError, name_list
from nucleate.layout import is_sharded
from nucleate.shells import named_modules, named_parameters


def refuse_unshardable(model: nn.Module, units: list[tuple[str, nn.Module]], whole: set[nn.Parameter]) -> None:
    """Refuse a model that FSDP2 cannot shard.

    Args:
        model: The model. Its deferred tensors appear as meta tensors.
        units: The modules that become units, innermost first, without the root.
        whole: The parameters that stay whole.

    Raises:
        ConfigurationError: A parameter cannot be sharded; the message gives its FQN.
    """
    _refuse_sharded(model)
    parameters = {name: p for name, p in named_parameters(model) if p not in whole}
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
        if parameter.requires_grad:
            dtypes.setdefault(owner[id(parameter)], {}).setdefault(parameter.dtype, name)
    for unit_name, found in dtypes.items():
        if len(found) > 1:
            listed = ", ".join(f"{name} is {dtype}" for dtype, name in found.items())
            raise ConfigurationError(
                "the trained parameters of one FSDP unit must have one dtype, but in "
                f"{unit_name or 'the root'} {listed}. Cast them to one dtype, freeze those of one dtype, or name a "
                "module that holds only one dtype in `wrap`."
            )
    _refuse_sparse_gradients(model, whole)
    _refuse_shared_memory(parameters)


def _refuse_sharded(model: nn.Module) -> None:
    sharded = [name for name, parameter in named_parameters(model) if is_sharded(parameter)]
    if sharded:
        raise ConfigurationError(
            f"{name_list(sharded)} are sharded already. Give `setup` the model as it was constructed; to set up a copy "
            "of a model that was set up, construct a second model and load the weights of the first into it."
        )


def _refuse_sparse_gradients(model: nn.Module, whole: set[nn.Parameter]) -> None:
    sparse = [
        f"{name}.weight" if name else "weight"
        for name, module in named_modules(model)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
        if module.weight.requires_grad and module.weight not in whole
    ]
    if sparse:
        raise sparse_gradients(sparse)


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
