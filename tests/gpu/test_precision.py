"""Training in each precision on the device, against a plain loop with torch's autocast and gradient scaler."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from nucleate import Runtime
from nucleate.precision import MixedPrecision
from nucleate.precision.casting import default_dtype
from tests.gpu.device import DEVICE_TYPE, device
from tests.gpu.models import construct, deferred_by
from tests.zoo import ZOO

pytestmark = pytest.mark.cuda
NUM_STEPS = 8


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [ZOO["gpt"][1](generator).to(device()) for _ in range(NUM_STEPS)]


def plain_losses(precision: str, infinite_at: int | None = None) -> tuple[list[float], list[float]]:
    """Train eagerly by hand; return losses and scales."""
    half = torch.bfloat16 if precision.startswith("bf16") else torch.float16
    is_mixed = precision.endswith("-mixed")
    with default_dtype(torch.float32 if is_mixed else half):
        model, _ = construct(ZOO["gpt"][0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler(DEVICE_TYPE, enabled=precision == "16-mixed")
    losses, scales = [], []
    for number, batch in enumerate(batches()):
        with torch.autocast(DEVICE_TYPE, dtype=half) if is_mixed else nullcontext():
            output = model(batch)
        loss = output.float().square().mean()
        scaler.scale(loss * (float("inf") if number == infinite_at else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    return losses, scales


def our_losses(precision: str, infinite_at: int | None = None) -> tuple[list[float], list[float]]:
    """Train the same model, deferred, by a runtime; return losses and scales."""
    runtime = Runtime(accelerator=DEVICE_TYPE, strategy="single_device", precision=precision)
    model = deferred_by(runtime, ZOO["gpt"][0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    wrapped, optimizer = runtime.setup(model, optimizer)
    losses, scales = [], []
    for number, batch in enumerate(batches()):
        loss = wrapped(batch).float().square().mean()
        runtime.backward(loss * (float("inf") if number == infinite_at else 1))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        scales.append(float(runtime.precision.state_dict().get("scale", 1.0)))
    return losses, scales


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-mixed"])
def test_losses_and_scales_are_those_of_a_plain_loop(precision: str) -> None:
    """A few steps in half precision give the losses of torch's own loop, and the scaler's scales."""
    expected, scales = plain_losses(precision)
    losses, our_scales = our_losses(precision)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)
    assert our_scales == scales
    assert losses[-1] < losses[0]


def test_an_overflow_skips_the_step_and_halves_the_scale() -> None:
    """An infinite gradient in `16-mixed` changes no weight and lowers the scale, as torch's loop does."""
    expected, scales = plain_losses("16-mixed", infinite_at=3)
    losses, our_scales = our_losses("16-mixed", infinite_at=3)
    assert our_scales == scales
    assert scales[3] == scales[2] / 2
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)


def test_the_scalers_state_is_saved_and_restored() -> None:
    """A scale that an overflow lowered survives `state_dict` on the device."""
    runtime = Runtime(accelerator=DEVICE_TYPE, strategy="single_device", precision="16-mixed")
    model = nn.Linear(4, 4)
    wrapped, optimizer = runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    runtime.backward(wrapped(torch.ones(2, 4, device=device())).sum() * float("inf"))
    optimizer.step()
    state = runtime.precision.state_dict()
    fresh = MixedPrecision.from_name("16-mixed")
    assert isinstance(fresh, MixedPrecision)
    Runtime(accelerator=DEVICE_TYPE, strategy="single_device", precision=fresh)
    fresh.load_state_dict(state)
    assert fresh.scaler is not None
    assert fresh.scaler.get_scale() == state["scale"] == 2.0**15


def test_buffers_stay_in_float32_in_bf16_true() -> None:
    """`bf16-true` makes parameters on the device in bfloat16 and keeps a float32 table of the constructor."""
    runtime = Runtime(accelerator=DEVICE_TYPE, strategy="single_device", precision="bf16-true")

    def make() -> nn.Module:
        model = nn.Linear(8, 8)
        model.register_buffer("table", 1 / 10_000 ** torch.linspace(0, 1, 8, dtype=torch.float32))
        return model

    model = deferred_by(runtime, make)
    runtime.setup(model)
    assert model.weight.dtype == torch.bfloat16
    assert model.table.dtype == torch.float32
    with default_dtype(torch.bfloat16):
        eager, _ = construct(make)
    assert torch.equal(model.weight, eager.weight)
    assert torch.equal(model.table, eager.table)
