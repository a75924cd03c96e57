"""On several ranks: micro-batches make the step of one large batch, under each strategy and precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nucleate import Runtime
from nucleate.precision import MixedPrecision
from tests.multi.device import accelerator, device

# Samplers draw on the CPU; the loaders move the batches to the device.
torch.set_default_device("cpu")
SIZE, BATCH, EVERY = 44, 2, 4


class Net(nn.Module):
    """Can have a parameter without a dimension, which FSDP does not shard."""

    def __init__(self, has_scalar: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.gain = nn.Parameter(torch.tensor(0.7 if has_scalar else [0.7]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.gain


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(SIZE, 3, generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    return x, x.sum(1, keepdim=True)


def loss_of(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(x), y)


def reference(world_size: int, clip: dict[str, float], has_scalar: bool) -> Net:
    """Train in one process by large batches: the loader gives each rank every so many-th sample."""
    torch.manual_seed(0)
    with device():
        model = Net(has_scalar)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = (tensor.to(device()) for tensor in data())
    large = BATCH * EVERY * world_size
    for _ in range(2):
        for xs, ys in zip(x.split(large), y.split(large), strict=True):
            optimizer.zero_grad()
            loss_of(model, xs, ys).backward()
            if "max_norm" in clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip["max_norm"])
            elif clip:
                nn.utils.clip_grad_value_(model.parameters(), clip["clip_val"])
            optimizer.step()
    return model


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(runtime: Runtime, clip: dict[str, float], has_scalar: bool) -> Any:
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        original = Net(has_scalar)
    model, optimizer = runtime.setup(original, torch.optim.SGD(original.parameters(), lr=0.1))
    with torch.device("cpu"):
        loader = runtime.setup_dataloaders(DataLoader(TensorDataset(*data()), batch_size=BATCH))
    lasts = []
    for _ in range(2):
        for x, y in loader:
            with runtime.accumulate(model, every=EVERY) as is_last:
                lasts.append(is_last)
                optimizer.zero_grad()
                runtime.backward(loss_of(model, x, y))
                if clip:
                    runtime.clip_gradients(model, optimizer, **clip)  # type: ignore[arg-type]
                optimizer.step()
    per_epoch = len(lasts) // 2
    assert lasts[per_epoch - 1]
    assert sum(lasts) == 2 * -(-per_epoch // EVERY)
    return original


def gradients_are_exchanged_at_the_last_micro_batch_alone(runtime: Runtime) -> None:
    model = runtime.setup(nn.Linear(3, 1).to(device()))
    for number in range(2):
        with runtime.accumulate(model, every=2):
            runtime.backward(model(torch.full((1, 3), float(runtime.global_rank + 1), device=device())).sum())
        gathered = runtime.all_gather(model.weight.grad.clone())
        assert (gathered.unique().numel() > 1) == (number == 0), gathered


def scaling() -> MixedPrecision:
    """Return 16-mixed with a scale that these gradients do not overflow: a skipped step is another matter."""
    return MixedPrecision(torch.float16, scaler=torch.amp.GradScaler(device().type, init_scale=256.0))


for strategy in ("ddp", "fsdp"):
    for precision in (None, scaling()):
        for clip in ({}, {"max_norm": 0.5}, {"clip_val": 0.05}):
            runtime = Runtime(accelerator=accelerator(), strategy=strategy, precision=precision)
            trained = train(runtime, clip, has_scalar=precision is None)
            expected = reference(runtime.world_size, clip, has_scalar=precision is None)
            for (name, mine), theirs in zip(trained.named_parameters(), expected.parameters(), strict=True):
                torch.testing.assert_close(
                    whole(mine), theirs, rtol=1e-2 if precision else 1e-4, atol=2e-3 if precision else 1e-5,
                    msg=lambda text, case=(strategy, precision, clip, name): f"{case}: {text}",
                )  # fmt: skip
gradients_are_exchanged_at_the_last_micro_batch_alone(Runtime(accelerator=accelerator(), strategy="ddp"))
print("accumulated", flush=True)
