"""A model that is set up, written as a folder that `from_pretrained` reads."""

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
    """Write weights, configuration and generation configuration; every rank calls it, and each writes its part.

    The weights keep the names and shapes that they have in the model; `from_pretrained` knows these as well as those
    that the model was loaded from.

    Args:
        runtime: What the model was set up with.
        path: A folder, which is made or replaced.
        model: What `runtime.setup` returned.
        max_shard_size: How large its files may be.

    Raises:
        UsageError: It is no model of transformers.
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
    """Stand for the method `save_pretrained` of a model that is sharded, of which transformers would save a part.

    Args:
        model: The model.
        save_directory: As the method takes it.
        kwargs: Likewise; with a `state_dict`, which the caller has gathered, the method does its work.

    Raises:
        UsageError: There is no `state_dict`.
    """
    if kwargs.get("state_dict") is None:
        raise UsageError(
            f"each rank has a part of this {type(model).__name__} only, which its method save_pretrained would write. "
            "Call nucleate_transformers.save_pretrained(runtime, path, model) on every rank."
        )
    type(model).save_pretrained(model, save_directory, **kwargs)
