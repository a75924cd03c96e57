"""The optimizers that cannot step parameters that FSDP2 has sharded, which are refused by name before any change.

Each rank steps its own shards, as DTensors. This works for an optimizer that computes each element by itself, as most
do. The optimizers in this file stop with an error of torch at their first step (torch 2.13).
"""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from nucleate.errors import ConfigurationError

_REASONS: dict[type[Optimizer], str] = {
    torch.optim.Adafactor: "it computes with norms of columns in place, which DTensor does not support",
    torch.optim.LBFGS: "it joins all gradients in one vector, and shards cannot be joined",
    torch.optim.Rprop: "it assigns to the elements under a mask, which DTensor does not support",
    torch.optim.SparseAdam: "it needs sparse gradients, and FSDP has dense ones",
}


def refuse_unsteppable(optimizer: Optimizer) -> None:
    """Refuse an optimizer that cannot step sharded parameters.

    Args:
        optimizer: The user's optimizer.

    Raises:
        ConfigurationError: The optimizer cannot step sharded parameters.
    """
    reason = next((reason for cls, reason in _REASONS.items() if isinstance(optimizer, cls)), None)
    if any(cls.__module__.partition(".")[0] == "bitsandbytes" for cls in type(optimizer).__mro__):
        reason = "the kernels of bitsandbytes do not take DTensors"
    if any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__):
        reason = "it deals whole parameters out to ranks, and `fully_shard` has split each of them already"
    if reason is not None:
        raise ConfigurationError(
            f"FSDP cannot step {type(optimizer).__name__}: {reason}. Use an optimizer that computes each element by "
            "itself, such as torch.optim.AdamW, or strategy='ddp'."
        )
