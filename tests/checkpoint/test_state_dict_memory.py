"""Loading a state dict before `setup` takes the memory of the weights that are kept, beside that of the dict."""

from __future__ import annotations

from pathlib import Path

import pytest

from nucleate.testing import assert_peak_memory_below

MIB = 2**20

# 114 MiB in fp32: large layers and many small tensors, so that neither a copy of one nor copies of the others hide.
SETUP = """
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from nucleate import Runtime

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 2048) for _ in range(12))
        self.small = nn.ParameterList(nn.Parameter(torch.zeros(1000, 200)) for _ in range(24))

def lazy():
    with runtime.init_module(empty_init=True):
        return Model()

runtime = Runtime(accelerator="cpu", precision=PRECISION)
# What is needed once, such as the first cast, is not counted.
warm = nn.Linear(300, 300)
with runtime.init_module(empty_init=True):
    again = nn.Linear(300, 300)
again.load_state_dict(warm.state_dict())
runtime.setup(again)
save_file(Model().float().state_dict(), PATH)
state = load_file(PATH) if MAPPED else {name: tensor.clone() for name, tensor in load_file(PATH).items()}
"""

WHERE = {
    "outside": "model = lazy(); model.load_state_dict(state); runtime.setup(model)",
    "inside": """
with runtime.init_module(empty_init=True):
    model = Model()
    model.load_state_dict(state)
runtime.setup(model)
""",
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("mapped", "precision", "kept_mib"), [(True, "32-true", 115), (False, "bf16-true", 58)])
def test_nothing_but_the_kept_weights_is_allocated(
    tmp_path: Path, where: str, mapped: bool, precision: str, kept_mib: int
) -> None:
    names = f"PATH = {str(tmp_path / 'm.safetensors')!r}; MAPPED = {mapped}; PRECISION = {precision!r}"
    assert_peak_memory_below((kept_mib + 16) * MIB, WHERE[where], f"{names}\n{SETUP}")
