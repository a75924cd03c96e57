"""Values for modules that a script has built on the meta device."""

from __future__ import annotations

import torch
from torch import nn

from nucleate.materialize import materialize


def materialize_meta_tensors(module: nn.Module, device: torch.device) -> None:
    """Give every tensor of `module` on the meta device a value on `device`, by the module's `reset_parameters`.

    Args:
        module: The module, changed in place.
        device: The device on which values are made and stay.

    Raises:
        UninitializedError: No method of its module writes a tensor.
    """
    materialize(module, device)
