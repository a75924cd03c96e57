"""Refused arguments of `from_pretrained`: those that a `Runtime` already decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nucleate.errors import ConfigurationError

_PLACES = "The runtime places the model: leave it out, and choose Runtime(accelerator=..., strategy=...)."
_QUANTIZES = (
    "The runtime quantizes: leave it out, and choose Runtime(precision='bnb-nf4') or another mode of "
    "nucleate-bitsandbytes, which quantizes each weight while reading it."
)
_REFUSED = {
    **dict.fromkeys(("device_map", "max_memory", "offload_folder", "offload_buffers"), _PLACES),
    "device_mesh": (
        "The runtime makes the mesh: leave it out, and name the axes in Runtime(strategy='tp=2') or 'fsdp+tp=2', or in "
        "nucleate.strategies.Parallel(mesh={'dp_shard': 2, 'tp': 2}, dimensions=...)."
    ),
    **dict.fromkeys(("quantization_config", "load_in_8bit", "load_in_4bit"), _QUANTIZES),
    "gguf_file": "GGUF files are read whole by transformers. Load them outside of init_module.",
}


def refuse_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse keywords of `from_pretrained` that contradict a runtime.

    Raises:
        ConfigurationError: One of these keywords has a value other than None or False.
    """
    for name, advice in _REFUSED.items():
        value = arguments.get(name)
        if value is not None and value is not False:
            raise ConfigurationError(f"from_pretrained({name}={value!r}) inside init_module. {advice}")


def refuse_distributed(folder: Any) -> None:
    """Refuse a folder with separate files of each rank, which transformers would read into the model immediately.

    Raises:
        ConfigurationError: Always.
    """
    raise ConfigurationError(
        f"{folder} has separate files of each rank (shard-*-model-*.safetensors), which cannot be bound to deferred "
        "weights. Load it outside of init_module, and save it again with save_pretrained in one process."
    )
