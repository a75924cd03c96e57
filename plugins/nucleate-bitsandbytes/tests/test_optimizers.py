"""The optimizers of bitsandbytes under nucleate: they train and resume on whole parameters, and FSDP refuses them."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from nucleate import Runtime
from nucleate.errors import ConfigurationError

OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (bnb.optim.AdamW8bit, {}),
    (bnb.optim.AdamW, {}),
    (bnb.optim.SGD8bit, {"momentum": 0.9}),
]


def build() -> nn.Module:
    # The first weight is large enough for a state of 8 bits.
    return nn.Sequential(nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 3))


def start(runtime: Runtime, cls: Any, options: dict[str, Any], seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    with runtime.init_module(empty_init=True):
        model = build()
    return runtime.setup(model, cls(model.parameters(), lr=0.01, **options))


def train(model: nn.Module, optimizer: Any, backward: Any, num_steps: int) -> list[float]:
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = model(torch.linspace(-1, 1, 2 * 96).view(2, 96)).square().mean()
        backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("strategy", ["single_device", "ddp"])
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS, ids=lambda value: getattr(value, "__name__", None))
def test_they_train_as_in_plain_torch_and_resume(
    cls: Any, options: dict[str, Any], strategy: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    eager = build()
    expected = train(eager, cls(eager.parameters(), lr=0.01, **options), torch.Tensor.backward, 6)
    runtime = Runtime(accelerator="cpu", strategy=strategy)
    model, optimizer = start(runtime, cls, options, seed=0)
    losses = train(model, optimizer, runtime.backward, 3)
    runtime.save(tmp_path / "last", {"model": model, "optimizer": optimizer})
    resumed, optimizer = start(runtime, cls, options, seed=1)
    runtime.load(tmp_path / "last", {"model": resumed, "optimizer": optimizer})
    assert losses + train(resumed, optimizer, runtime.backward, 3) == expected


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS, ids=lambda value: getattr(value, "__name__", None))
def test_fsdp_refuses_them_by_name_before_anything_is_made(cls: Any, options: dict[str, Any]) -> None:
    runtime = Runtime(accelerator="cpu", strategy="fsdp")
    with runtime.init_module():
        model = build()
    with pytest.raises(ConfigurationError, match=rf"FSDP cannot step {cls.__name__}: the kernels of bitsandbytes"):
        runtime.setup(model, cls(model.parameters(), lr=0.01, **options))
    assert "deferred" in repr(model[0].weight)


def test_an_optimizer_of_weights_that_were_quantized_fails_by_name() -> None:
    runtime = Runtime(accelerator="cpu", precision="bnb-int8")
    with runtime.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32))
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=r"AdamW has 0\.weight, which the precision has quantized"):
        runtime.setup(model, torch.optim.AdamW(model.parameters()))
    wrapped = runtime.setup(model)
    with pytest.raises(RuntimeError, match=r"former parameter 0\.weight, which `setup` has replaced"):
        early.zero_grad()
    runtime.setup_optimizers(torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)).step()
