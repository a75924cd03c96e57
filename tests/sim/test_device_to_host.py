"""A save holds what the device has when it is called, though copies on the device are still under way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nucleate import Runtime


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", ["saved.safetensors", "saved.pt", "folder", "dcp"])
def test_pending_copies_of_every_device_are_waited_for(name: str, asynchronous: bool, tmp_path: Path, sim: Any) -> None:
    runtime = Runtime(accelerator="cpu")
    news = [torch.randn(700, 901) + index for index in range(2)]
    state = {}
    for index, new in enumerate(news):
        value = torch.zeros(700, 901, device=f"sim:{index}")
        # In a stream of the caller's own, whose copies nothing else waits for.
        with torch.Stream(device=f"sim:{index}"):
            value.copy_(new.pin_memory(), non_blocking=True)
        state[f"value{index}"] = value
    state["turned"] = state["value0"].t()
    kind = {"folder": "safetensors", "dcp": "dcp"}.get(name)
    handle = runtime.save(tmp_path / name, state, format=kind, asynchronous=asynchronous)
    if handle is not None:
        for index in range(2):
            state[f"value{index}"].zero_()
        handle.wait()
    loaded = {key: torch.zeros_like(value) for key, value in state.items()}
    runtime.load(tmp_path / name, loaded)
    for index, new in enumerate(news):
        assert torch.equal(loaded[f"value{index}"].cpu(), new)
    assert torch.equal(loaded["turned"].cpu(), news[0].t())
    assert sim.counts()["h2d.pageable.bytes"] == 0
