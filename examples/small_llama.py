"""A byte-level LLaMA that is trained in half a minute, to see whether a way to load weights costs accuracy.

It learns from the modules of the standard library of the Python that runs this, nine of ten; the tenths are held out.
"""

from __future__ import annotations

import math
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import SIZES, Llama
from nucleate import Runtime
from nucleate.report import progress

CONFIG = SIZES["tiny"]
CONTEXT = 128  # bytes in a window


def read_text() -> tuple[Tensor, Tensor]:
    """Return windows `(windows, CONTEXT + 1)` of bytes to train on, and windows of held-out text."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_bytes() for path in paths]
    held_out = texts[::10]
    del texts[::10]
    training, validation = (
        torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8).unfold(0, CONTEXT + 1, CONTEXT)
        for part in (texts, held_out)
    )
    return training, validation[:: max(1, len(validation) // 128)][:128]  # evenly spread, 16 KiB


def train(path: Path, steps: int, at_most_s: float = 25) -> tuple[float, int, float]:
    """Train a model, save its weights in bfloat16, and return its held-out loss in fp32, the steps and the seconds.

    Args:
        path: The folder to make, for `model.safetensors`.
        steps: How many steps to train, if they take less than `at_most_s`.
        at_most_s: When to stop; the learning rate has come down to zero by then, too.
    """
    runtime = Runtime(accelerator="cpu", strategy="single_device")
    runtime.seed_everything(0)
    training, validation = read_text()
    with runtime.init_module(empty_init=True):
        model = Llama(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    model, optimizer = runtime.setup(model, optimizer)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model gains nothing by a second one, and loses much where cores are busy
    started = time.perf_counter()
    bar = progress(range(1, steps + 1), description="Training")
    for step in bar:
        done = max(step / steps, (time.perf_counter() - started) / at_most_s)
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, 10 * done, 0.02 + math.cos(math.pi / 2 * min(1.0, done)))
        loss = next_byte_loss(model, training[torch.randint(len(training), (8,))])
        runtime.backward(loss)
        runtime.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.show(loss=f"{loss.item():.3f}")
        if done >= 1:
            break
    seconds = time.perf_counter() - started
    loss_fp32 = held_out_loss(model, validation)
    torch.set_num_threads(num_threads)
    path.mkdir()
    runtime.save(path / "model.safetensors", model.module.to(torch.bfloat16))
    return loss_fp32, step, seconds


def next_byte_loss(model: nn.Module, windows: Tensor) -> Tensor:
    tokens = windows.long()
    logits = model(tokens[:, :-1])
    logits = getattr(logits, "logits", logits)  # transformers returns an object
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.inference_mode()
def held_out_loss(model: nn.Module, windows: Tensor) -> float:
    """Return the mean loss in nats per byte."""
    return torch.stack([next_byte_loss(model, part) for part in windows.split(32)]).mean().item()
