"""The state of torch's `ZeroRedundancyOptimizer` (ZeRO stage 1), to be saved from each rank's own part.

Each rank keeps the state of some parameters. In the result, each of these tensors is a DTensor on a mesh of the one
rank that has it, so a save lets that rank write it. No tensor is exchanged: the ranks tell each other only the names,
shapes and dtypes. torch's own way, `consolidate_state_dict`, sends all tensors to one rank.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nucleate.cluster.communicator import Communicator

_MODULE = "torch.distributed.optim.zero_redundancy_optimizer"
#: A tensor of another rank: its shape and dtype.
_Form = tuple[tuple[int, ...], torch.dtype]


def is_zero(optimizer: Optimizer) -> bool:
    """Return whether an optimizer is a `ZeroRedundancyOptimizer`. Its module is not imported."""
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(optimizer, module.ZeroRedundancyOptimizer)


def zero_state(optimizer: Any, communicator: Communicator) -> dict[str, Any]:
    """Return the whole state in the form of torch's `state_dict`. Every rank must call this.

    Args:
        optimizer: The optimizer.
        communicator: The communicator of this process.
    """
    packed = Optimizer.state_dict(optimizer)
    numbers = {
        id(parameter): number
        for group, numbered in zip(optimizer.param_groups, packed["param_groups"], strict=True)
        for parameter, number in zip(group["params"], numbered["params"], strict=True)
    }
    # The optimizer of this rank's parameters. Its state is keyed by parameter.
    mine = {numbers[id(parameter)]: fields for parameter, fields in optimizer.optim.state.items()}
    forms = {number: {name: _form(value) for name, value in fields.items()} for number, fields in mine.items()}
    owners: dict[int, tuple[int, dict[str, Any]]] = {}
    for rank, of_rank in enumerate(communicator.gather_objects(forms)):
        for number, fields in of_rank.items():
            owners.setdefault(number, (rank, fields))
    meshes = _meshes(communicator) if owners else []
    state = {
        number: {
            name: _placed(form, mine[number][name] if rank == communicator.rank else None, meshes[rank])
            for name, form in fields.items()
        }
        for number, (rank, fields) in sorted(owners.items())
    }
    return {**packed, "state": state}


def _form(value: Any) -> Any:
    """Return the shape and dtype of a tensor. A tensor of one number, such as a step, goes to all ranks itself."""
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) and value.dim() else value


def _placed(form: Any, value: Tensor | None, mesh: Any) -> Any:
    """Return a value of the state: a DTensor on the mesh of the rank that has it, or a plain value."""
    is_tensor = isinstance(form, tuple) and len(form) == 2 and isinstance(form[1], torch.dtype)
    if not is_tensor:
        return form
    from torch.distributed.tensor import DTensor, Replicate

    shape, dtype = form
    local = torch.empty(0, dtype=dtype, device=mesh.device_type) if value is None else value.detach()
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Replicate()], run_check=False, shape=torch.Size(shape), stride=stride)


def _meshes(communicator: Communicator) -> list[Any]:
    """Return a mesh of one rank for each rank."""
    from torch.distributed.device_mesh import DeviceMesh

    kind = communicator.device.type
    return [DeviceMesh(kind, [rank]) for rank in range(communicator.world_size)]
