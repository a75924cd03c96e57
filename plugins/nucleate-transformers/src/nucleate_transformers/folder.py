"""Folders for `from_pretrained`, written from a model that is set up."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from nucleate.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from nucleate import Runtime


def save_pretrained(
    runtime: Runtime, path: str | os.PathLike[str], model: nn.Module, *, max_shard_size: int | str = "5GB"
) -> None:
    """Write weights, configuration and generation configuration. Every rank must call it, and writes its own part.

    The weights keep the names and shapes that they have in the model. `from_pretrained` reads these as well as the
    names and shapes of the original checkpoint.

    Args:
        runtime: The runtime that set the model up.
        path: The folder, which is created or replaced.
        model: The model that `runtime.setup` returned.
        max_shard_size: The largest size of a file.

    Raises:
        UsageError: The model is not a model of transformers.
    """
    inner: Any = getattr(model, "module", model)
    if not isinstance(inner, PreTrainedModel):
        raise UsageError(
            f"save_pretrained takes a model of transformers, not {type(inner).__name__}. Use runtime.save."
        )
    runtime.save(path, model, format="safetensors", max_shard_size=max_shard_size)
    with runtime.rank_zero_first():
        if runtime.is_global_zero:
            inner.config.dtype = str(inner.dtype).removeprefix("torch.")
            inner.config.architectures = [type(inner).__name__.removeprefix("FSDP")]
            quantization = runtime.precision.quantization_config(inner)
            if quantization is not None:
                inner.config.quantization_config = quantization
            inner.config.save_pretrained(path)
            if inner.can_generate():
                inner.generation_config.save_pretrained(path)


def save_unsharded(model: PreTrainedModel, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """Replace the method `save_pretrained` of a sharded model, which would save only this rank's part.

    Args:
        model: The model.
        save_directory: The method's argument.
        kwargs: The method's keyword arguments. With a `state_dict`, which the caller has gathered, the original method
            runs.

    Raises:
        UsageError: There is no `state_dict`.
    """
    if kwargs.get("state_dict") is None:
        raise UsageError(
            f"each rank has only a part of this {type(model).__name__}, and its method save_pretrained would write "
            "only that part. Call nucleate_transformers.save_pretrained(runtime, path, model) on every rank."
        )
    type(model).save_pretrained(model, save_directory, **kwargs)
