"""On 2 ranks: a launcher with variables of its own, whose values the user gives to `Runtime`."""

from __future__ import annotations

import os

from torch import nn

from nucleate import Runtime
from nucleate.cluster import Environment

rank, size = int(os.environ.pop("RANK")), int(os.environ.pop("WORLD_SIZE"))
place = Environment("mine", world_size=size, global_rank=rank, local_rank=rank, local_world_size=size)
runtime = Runtime(accelerator="cpu", strategy="fsdp", plugins=place)
runtime.setup(nn.Linear(3, 3))
assert runtime.all_reduce(rank + 1, reduce_op="sum") == 3
print(f"{runtime.global_rank} of {runtime.world_size} without torchrun's variables")
