"""Where the memory of a model lies: in private memory, or in files that are mapped.

A model whose weights are mapped is ready sooner, because it reads nothing yet: the first use reads it, and the first
update copies it. So the tables say which of the two each way leaves.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

_MAPS = Path("/proc/self/maps")


@dataclass(frozen=True)
class Held:
    """How many bytes of a model's parameters and buffers this process holds, and where.

    Attributes:
        private_bytes: In anonymous memory.
        mapped_bytes: In mappings of files, whether or not their pages have been read.
    """

    private_bytes: int
    mapped_bytes: int

    @classmethod
    def by(cls, model: nn.Module) -> Held:
        """Look where the model's tensors lie; reads none of them."""
        ends, is_file = _mappings()
        private = mapped = 0
        for tensor in (*model.parameters(), *model.buffers()):
            local = local_of(tensor)
            if is_file[bisect.bisect_right(ends, local.data_ptr())]:
                mapped += local.nbytes
            else:
                private += local.nbytes
        return cls(private, mapped)


def local_of(tensor: Any) -> Tensor:
    """Return what this rank holds of a tensor."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _mappings() -> tuple[list[int], list[bool]]:
    ends, is_file = [], []
    for line in _MAPS.read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        ends.append(int(addresses.partition("-")[2], 16))
        is_file.append(inode != "0")
    # Nothing that is above them is a file.
    return ends, [*is_file, False]
