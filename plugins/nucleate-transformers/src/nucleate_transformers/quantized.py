"""Quantized checkpoints: the precision gives the model quantized layers, which take the stored weights unchanged.

transformers' own loader expects the modules of its own quantizers. So it does not get the keys of quantized layers
here. The layers return element sources for these keys (`nucleate.checkpoint.StoredForm`), which are bound to the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nucleate import Precision
from nucleate.checkpoint.loading import StoredForm
from nucleate.deferred import ElementSource, bind
from nucleate.errors import CheckpointError, CheckpointKeyError, ConfigurationError, name_list


def quantization_of(config: Any) -> Any:
    """Return the quantization settings of a checkpoint's configuration, or None."""
    found = getattr(config, "quantization_config", None)
    return found or getattr(config.get_text_config(decoder=True), "quantization_config", None)


def refuse_unknown(config: Any, precision: Precision) -> None:
    """Refuse a quantized checkpoint if the precision has no layers for it: its bytes are not plain weights.

    Raises:
        ConfigurationError: The precision has no layers for the quantized checkpoint.
    """
    found = quantization_of(config)
    if found is None or type(precision).before_load is not Precision.before_load:
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    raise ConfigurationError(
        f"this checkpoint is quantized ({str(getattr(method, 'value', method))!r} in the configuration), and precision "
        f"{precision.name!r} has no layers for it. Use the precision that it was quantized with, such as 'bnb-nf4' of "
        "nucleate-bitsandbytes, or load the unquantized checkpoint."
    )


def take_quantized(
    model: PreTrainedModel, stored: Mapping[str, ElementSource], precision: Precision, device: torch.device
) -> dict[str, set[str]]:
    """Give a model quantized layers for the quantized weights of a checkpoint, and bind these weights.

    Args:
        model: The model, which transformers has constructed on the meta device.
        stored: The checkpoint's element sources by key.
        precision: The precision, which makes the layers.
        device: The device of the deferred tensors.

    Returns:
        The checkpoint's keys of each quantized layer, by the layer's name.

    Raises:
        CheckpointError: A layer cannot take its stored weights, or the precision finds no quantized layer.
        CheckpointKeyError: The checkpoint lacks a part of a layer, or has more than the layer takes.
    """
    modules = dict(model.named_modules())
    keys = {_name_here(key, model, modules): key for key in stored}
    precision.before_load(model, {name: stored[key] for name, key in keys.items()})
    taken: dict[str, set[str]] = {}
    for fqn, module in model.named_modules():
        if not isinstance(module, StoredForm):
            continue
        mine = {name.removeprefix(f"{fqn}."): key for name, key in keys.items() if name.startswith(f"{fqn}.")}
        try:
            found = module.bind_stored({name: stored[key] for name, key in mine.items()})
        except CheckpointError as error:
            raise CheckpointError(f"{fqn}: {error}") from error
        strange = [mine[name] for name in mine if name not in found.used]
        if found.missing or strange:
            raise CheckpointKeyError(
                f"{fqn} is quantized: for this layer, the checkpoint lacks {name_list(found.missing) or 'nothing'} and "
                f"has {name_list(strange) or 'nothing'} in addition."
            )
        assert isinstance(module, nn.Module)
        for name, given in found.given.items():
            _bind(module, name, given, device)
        taken[fqn] = set(mine.values())
    if not taken:
        raise CheckpointError(
            f"the configuration says that the checkpoint is quantized, but precision {precision.name!r} finds no "
            "quantized layer there."
        )
    return taken


def mark_loaded(model: PreTrainedModel, taken: Mapping[str, set[str]], missing: set[str]) -> None:
    """Keep transformers from initializing quantized layers, which it has not loaded itself.

    Args:
        model: The model.
        taken: The result of `take_quantized`.
        missing: Names that transformers reports as missing; the names of the quantized layers are removed.
    """
    for fqn in taken:
        module = model.get_submodule(fqn)
        module.__dict__["_is_hf_initialized"] = True
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.__dict__["_is_hf_initialized"] = True
        missing.difference_update([name for name in missing if name.startswith(f"{fqn}.")])


def _bind(module: nn.Module, name: str, given: ElementSource, device: torch.device) -> None:
    """Replace a module's tensor that has no recipe by a deferred tensor, bound to an element source."""
    old = getattr(module, name)
    tensor = torch.empty(old.shape, dtype=old.dtype, device=device)
    bind(tensor, given)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(module, name, tensor)


def _name_here(key: str, model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> str:
    """Return the model's name for a key: the checkpoint may be of the base model, or of a model around this one."""
    prefix = f"{model.base_model_prefix}."
    for name in (key, key.removeprefix(prefix), f"{prefix}{key}"):
        parts = name.split(".")
        # The layer is a module; after its name come one or more parts (`weight.absmax`).
        if any(".".join(parts[:length]) in modules for length in range(len(parts) - 1, max(0, len(parts) - 4), -1)):
            return name
    return key
