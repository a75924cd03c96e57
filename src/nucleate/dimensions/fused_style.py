"""The style of a linear layer whose weight holds several matrices, one below the other, such as a fused QKV."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel

# Private to torch (2.13), which has no other placement with several parts.
from torch.distributed.tensor.placement_types import _StridedShard


class FusedColwise(ColwiseParallel):
    """`ColwiseParallel` that gives each rank a part of each matrix. The output has the parts in the same order.

    Args:
        num_parts: The number of matrices. They have equal sizes.
    """

    def __init__(self, num_parts: int) -> None:
        layout: Any = _StridedShard(-1, split_factor=num_parts)
        super().__init__(output_layouts=layout)
        self._num_parts = num_parts

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        for key, parameter in list(module.named_parameters()):
            split = _StridedShard(0, split_factor=self._num_parts)
            laid_out = distribute_tensor(parameter, device_mesh, [split], src_data_rank=None)
            module.register_parameter(key, nn.Parameter(laid_out, requires_grad=parameter.requires_grad))
