"""On 2 ranks: the backend that a strategy asks for is that of the process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from nucleate import Runtime
from nucleate.strategies import DDPStrategy

strategy = DDPStrategy(process_group_backend="cpu:gloo")
runtime = Runtime(accelerator="cpu", strategy=strategy)
model = runtime.setup(nn.Linear(2, 2))
runtime.backward(model(torch.ones(1, 2)).sum())
print("the group has", dist.get_backend_config())
