"""Checkpoints whose weights are quantized: the precision gives the model their layers, which take them as they are.

transformers' own loader knows parameters by the modules that its quantizers put in. Here the keys of quantized layers
are kept from it: what they stand for is said by the layers (`nucleate.checkpoint.StoredForm`), and bound to the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nucleate import Precision
from nucleate.checkpoint.loading import StoredForm
from nucleate.deferred import Given, give
from nucleate.errors import CheckpointError, CheckpointKeyError, ConfigurationError, name_list


def quantization_of(config: Any) -> Any:
    """Return what a configuration says of how its checkpoint is quantized, or None."""
    found = getattr(config, "quantization_config", None)
    return found or getattr(config.get_text_config(decoder=True), "quantization_config", None)


def refuse_unknown(config: Any, precision: Precision) -> None:
    """Refuse a quantized checkpoint for which the precision has no layers: as plain weights it would be garbage.

    Raises:
        ConfigurationError: It is one.
    """
    found = quantization_of(config)
    if found is None or type(precision).before_load is not Precision.before_load:
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    raise ConfigurationError(
        f"this checkpoint is quantized ({str(getattr(method, 'value', method))!r} in the configuration), and precision "
        f"{precision.name!r} has no layers for it. Use the precision that it was quantized with, such as 'bnb-nf4' of "
        "nucleate-bitsandbytes; or load the checkpoint that it was made from."
    )


def take_quantized(
    model: PreTrainedModel, stored: Mapping[str, Given], precision: Precision, device: torch.device
) -> dict[str, set[str]]:
    """Give a model quantized layers where a checkpoint has quantized weights, and bind these.

    Args:
        model: The model, which transformers has constructed on the meta device.
        stored: The checkpoint's tensors by key.
        precision: Makes the layers.
        device: The device that deferred tensors stand for.

    Returns:
        For each of these layers, by name, the keys of the checkpoint that are its own.

    Raises:
        CheckpointError: A layer cannot take what is stored for it, or none takes what is quantized.
        CheckpointKeyError: A part of a layer is not stored.
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
            found = module.take_stored({name: stored[key] for name, key in mine.items()})
        except CheckpointError as error:
            raise CheckpointError(f"{fqn}: {error}") from error
        strange = [mine[name] for name in mine if name not in found.used]
        if found.missing or strange:
            raise CheckpointKeyError(
                f"{fqn} is quantized: the checkpoint lacks {name_list(found.missing) or 'nothing'} of it and has "
                f"{name_list(strange) or 'nothing'} besides."
            )
        assert isinstance(module, nn.Module)
        for name, given in found.given.items():
            _bind(module, name, given, device)
        taken[fqn] = set(mine.values())
    if not taken:
        raise CheckpointError(
            f"the configuration says that the checkpoint is quantized, but precision {precision.name!r} finds no "
            "quantized layer in it."
        )
    return taken


def mark_loaded(model: PreTrainedModel, taken: Mapping[str, set[str]], missing: set[str]) -> None:
    """Keep transformers from initializing quantized layers, which it has not loaded itself.

    Args:
        model: The model.
        taken: From `take_quantized`.
        missing: Names that transformers takes for missing; those of these layers are taken out.
    """
    for fqn in taken:
        module = model.get_submodule(fqn)
        module.__dict__["_is_hf_initialized"] = True
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.__dict__["_is_hf_initialized"] = True
        missing.difference_update([name for name in missing if name.startswith(f"{fqn}.")])


def _bind(module: nn.Module, name: str, given: Given, device: torch.device) -> None:
    """Put a deferred tensor, bound to what is given, where a module has one without a recipe."""
    old = getattr(module, name)
    tensor = torch.empty(old.shape, dtype=old.dtype, device=device)
    give(tensor, given)
    if isinstance(old, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
    setattr(module, name, tensor)


def _name_here(key: str, model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> str:
    """Return a key as the model calls it: a checkpoint may be of its base, or of what it is the base of."""
    prefix = f"{model.base_model_prefix}."
    for name in (key, key.removeprefix(prefix), f"{prefix}{key}"):
        parts = name.split(".")
        # The layer is a module; what is behind it may be one name or several (`weight.absmax`).
        if any(".".join(parts[:length]) in modules for length in range(len(parts) - 1, max(0, len(parts) - 4), -1)):
            return name
    return key
