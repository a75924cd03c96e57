"""Choice of the strategy that a user asked for: by an object, by a name, or by `"auto"`."""

from __future__ import annotations

from typing import cast

from nucleate.errors import PluginNotFoundError
from nucleate.registry import STRATEGIES
from nucleate.strategies.base import Strategy
from nucleate.strategies.mesh_names import is_mesh_name, parse

_NO_DEEPSPEED = (
    "needs a plugin for DeepSpeed, which does not exist yet. strategy='fsdp' shards parameters, gradients and "
    "optimizer state, as ZeRO stage 3 does. FSDPStrategy(reshard_after_forward=False) keeps gathered parameters until "
    "backward, as stage 2 does, and 'fsdp_cpu_offload' keeps the shards in host memory"
)
_NO_XLA = "needs a plugin for XLA devices, which does not exist yet. On other accelerators use 'ddp' or 'fsdp'"
#: Names of Lightning Fabric without a strategy here. A plugin that registers such a name takes it over.
_ELSEWHERE = {
    "dp": (
        "would run several devices in the threads of one process, which nucleate does not do. Use strategy='ddp' with "
        "one process for each device"
    ),
    "deepspeed": _NO_DEEPSPEED,
    "xla": _NO_XLA,
    "single_xla": _NO_XLA,
    "single_tpu": _NO_XLA,
}


def choose(choice: str | Strategy | None, world_size: int) -> Strategy:
    """Return the chosen strategy.

    Args:
        choice: The argument of `Runtime(strategy=...)`. None is `"auto"`: DDP in several processes, else one device.
        world_size: The number of processes.

    Raises:
        PluginNotFoundError: No strategy has that name.
        ConfigurationError: `choice` is neither a name nor a strategy.
    """
    if choice is None:
        choice = "auto"
    if isinstance(choice, str):
        if choice not in STRATEGIES.names():
            choice = choice.lower()
        if choice == "auto":
            choice = "ddp" if world_size > 1 else "single_device"
        if choice not in STRATEGIES.names() and is_mesh_name(choice):
            return parse(choice)
        if choice not in STRATEGIES.names():
            family = next((name for name in _ELSEWHERE if choice == name or choice.startswith(f"{name}_")), None)
            if family is not None:
                raise PluginNotFoundError(f"strategy={choice!r} {_ELSEWHERE[family]}.")
    return cast(Strategy, STRATEGIES.choose(choice))
