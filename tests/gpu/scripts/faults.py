"""A small training on several devices in which rank 1 raises; run by test_ranks.py."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn

from nucleate import Runtime
from tests.gpu.device import DEVICE_TYPE


def main(strategy: str, fault: str, folder: Path) -> None:
    runtime = Runtime(accelerator=DEVICE_TYPE, strategy=strategy)
    runtime.launch()

    def fail(at: str) -> None:
        if fault == at and runtime.global_rank == 1:
            (folder / "raised").write_text(str(time.time()))
            raise ValueError("out of cheese")

    with runtime.init_module(empty_init=True):
        fail("constructor")
        model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
    if fault == "setup" and runtime.global_rank == 1:
        (folder / "raised").write_text(str(time.time()))
        model[2] = nn.Linear(32, 33)
    model, optimizer = runtime.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    for step in range(4):
        if step == 2:
            fail("training")
        loss = model(torch.randn(4, 32, device=runtime.device)).square().mean()
        runtime.backward(loss)
        runtime.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    (folder / f"trained-{runtime.global_rank}").touch()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
