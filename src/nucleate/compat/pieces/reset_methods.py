"""`reset_parameters` methods that a script gives to module objects: Fabric calls them for deferred models."""

from __future__ import annotations

import torch
from torch import nn

from nucleate.deferred import record_of


def call_assigned_reset_methods(model: nn.Module) -> None:
    """Call `reset_parameters` of each module object that a script has given one, if the module is deferred.

    Fabric calls every `reset_parameters` of a model on the meta device. nucleate makes the values of the constructor
    without them. So only a method that is not the class's own can change a value.

    Args:
        model: The model, inside a block that records.
    """
    for module in model.modules():
        method = vars(module).get("reset_parameters")
        if callable(method) and any(record_of(tensor) is not None for tensor in module.parameters(recurse=False)):
            with torch.no_grad():
                method()
