"""Models of transformers whose modules load in their own way: files of older versions, before `setup`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, RTDetrResNetConfig
from transformers.models.rt_detr.modeling_rt_detr import RTDetrConfig, RTDetrConvEncoder

from nucleate import Runtime
from tests.device import ACCELERATOR

pytestmark = pytest.mark.usefixtures("factories_on_device")


def mamba() -> nn.Module:
    config = MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2, vocab_size=50, use_mambapy=False)
    return MambaForCausalLM(config)


def older_mamba(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The embedding had another name."""
    return {name.replace("embeddings.", "embedding."): tensor for name, tensor in state.items()}


def encoder() -> nn.Module:
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage1", "stage2"]
    )
    return RTDetrConvEncoder(RTDetrConfig(backbone_config=backbone, freeze_backbone_batch_norms=True))


def older_encoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Frozen batch norms drop the counters that trained ones saved."""
    counters = {n.replace("running_mean", "num_batches_tracked"): torch.tensor(3) for n in state if "running_mean" in n}
    return {**state, **counters}


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "mamba": (mamba, older_mamba),
    "frozen batch norms": (encoder, older_encoder),
}


@pytest.mark.parametrize("way", ["file", "state dict"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_an_older_version_is_loaded_before_setup(tmp_path: Path, kind: str, way: str) -> None:
    make, age = KINDS[kind]
    torch.manual_seed(1)
    source = make()
    for tensor in (*source.parameters(), *source.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor)
    stored = age(dict(source.state_dict()))
    source.load_state_dict(stored)
    runtime = Runtime(accelerator=ACCELERATOR, precision="32-true")
    with runtime.init_module(empty_init=True):
        model: Any = make()
    if way == "file":
        save_file({name: tensor.clone() for name, tensor in stored.items()}, tmp_path / "m.safetensors")
        assert runtime.load_raw(tmp_path / "m.safetensors", model).is_exact
    else:
        model.load_state_dict(stored)
    made = runtime.setup(model).module.state_dict()
    expected = source.state_dict()
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in expected)
