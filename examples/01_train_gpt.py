"""Train a small GPT on the source code of Python itself.

    python examples/01_train_gpt.py                                        # 0.4M parameters, half a minute
    python examples/01_train_gpt.py --size 10m --precision bf16-mixed      # larger, in another precision
    python examples/01_train_gpt.py --resume                               # go on from the last checkpoint
    torchrun --nproc-per-node 2 examples/01_train_gpt.py --strategy fsdp   # two processes, half the model each

The text is the standard library of the Python that runs this: nothing is downloaded. `--batch-size` counts
all processes together, so the loss curve is the same on one process and on many.
"""

from __future__ import annotations

import argparse
import csv
import math
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gpt import GPT, SIZES
from nucleate import RandomState, Runtime
from nucleate.report import format_bytes, peak_rss_bytes, progress, save_loss_curve


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    config = SIZES[args.size]

    # What to run on, in three words; torchrun says how many processes there are.
    runtime = Runtime(accelerator=args.accelerator, strategy=args.strategy, precision=args.precision)
    runtime.launch()
    runtime.seed_everything(args.seed)
    if args.batch_size % runtime.world_size:
        raise SystemExit(
            f"--batch-size {args.batch_size} cannot be split over {runtime.world_size} processes: "
            f"choose a multiple of {runtime.world_size}."
        )

    # The data: each process gets its share of every batch, on its own device.
    training_text, validation_text = read_standard_library()
    batch_size = args.batch_size // runtime.world_size
    order = torch.Generator().manual_seed(args.seed)  # The same order, whatever the weights draw.
    batches, validation_batches = runtime.setup_dataloaders(
        DataLoader(Windows(training_text, config.context), batch_size, shuffle=True, drop_last=True, generator=order),
        DataLoader(Windows(validation_text, config.context, at_most=8 * args.batch_size), batch_size),
    )

    # The model: the constructor runs, but no weight is made yet. `setup` makes each one once, where it will
    # live and in the precision it will have; under fsdp only the part that this process owns.
    with runtime.init_module(empty_init=True):
        model = GPT(config)
    # Adam divides by the root of the squared gradients. In fp16 small squares are zero: eps must be felt.
    eps = 1e-4 if args.precision == "16-true" else 1e-8
    learning_rate = args.learning_rate or 0.5 / config.dim  # the wider, the slower
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), eps=eps)
    model, optimizer = runtime.setup(model, optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_then_cosine(step, args.steps))

    # Whatever the next step depends on. What is saved whole is resumed exactly.
    state = {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "precision": runtime.precision,  # fp16 gradients are scaled, by a number that is learnt
        "batches": batches,  # which of them were already seen
        "random": RandomState(),  # nothing here draws from it; dropout would
        "losses": [],  # one for each step done
        "validation": {},  # steps done -> loss
    }
    if args.resume:
        runtime.load(args.out / "checkpoint", state)
    losses, validation = state["losses"], state["validation"]

    runtime.print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(training_text):,} bytes of text, "
        f"{runtime.world_size} x {runtime.device.type}, {args.precision}, {len(losses)} of {args.steps} steps done"
    )
    last = min(args.steps, args.stop_after or args.steps)
    steps = progress(
        range(len(losses) + 1, last + 1), initial=len(losses), total=args.steps, enabled=runtime.is_global_zero
    )
    endless_batches = repeat(batches)
    num_bytes, started = 0, time.perf_counter()
    for step in steps:
        inputs, targets = next(endless_batches)
        loss = next_byte_loss(model, inputs, targets)
        runtime.backward(loss)
        runtime.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

        losses.append(runtime.all_reduce(loss.detach()).item())  # the mean over the processes
        num_bytes += args.batch_size * config.context
        if step % args.validate_every == 0 or step == args.steps:
            validation[step] = validate(runtime, model, validation_batches)
            steps.print(f"step {step}: validation loss {validation[step]:.3f}")
        if step % args.checkpoint_every == 0 or step == last:
            runtime.save(args.out / "checkpoint", state)
        peak_bytes = runtime.accelerator.peak_memory_bytes() or peak_rss_bytes() or 0  # the device's, else the host's
        speed = num_bytes / (time.perf_counter() - started)
        steps.show(**{"loss": f"{losses[-1]:.3f}", "tokens/s": f"{speed:.0f}", "peak": format_bytes(peak_bytes)})

    # What came of it. Under fsdp no process has the whole model, so all of them write the sample, in step.
    sample = write(model, "def ", args.sample_bytes, config.context, runtime.device)
    runtime.print(f"\nThe model writes:\n\n{sample}\n")
    if runtime.is_global_zero:
        save_losses(args.out / "losses.csv", losses, validation)
        title = f"GPT of size {args.size} on Python's source"
        picture = save_loss_curve(
            args.out / "losses.svg", losses, validation=validation, title=title, unit="nats per byte"
        )
        print(f"Checkpoint: {args.out / 'checkpoint'}\nLoss of every step: {args.out / 'losses.csv'}\nPlot: {picture}")


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Stretches of a text, one after the other; the target of each byte is the byte that follows it.

    Args:
        text: The text.
        length: Bytes in a window.
        at_most: Take only so many windows, spread evenly over the text.
    """

    def __init__(self, text: bytes, length: int, at_most: int | None = None) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.length = length
        num_windows = (len(text) - 1) // length
        self.starts = range(0, num_windows * length, length * max(1, num_windows // (at_most or num_windows)))[:at_most]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = self.starts[index]
        window = self.text[start : start + self.length + 1].long()
        return window[:-1], window[1:]


def read_standard_library() -> tuple[bytes, bytes]:
    """Return the source of this Python's standard library: nine files of ten to train on, and the tenths."""
    root = Path(sysconfig.get_path("stdlib"))
    not_prose = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    texts = [(root / name).read_bytes() for name in names if not_prose.isdisjoint(name.split("/"))]
    if len(texts) < 10:
        raise SystemExit(f"There is no standard library source to train on in {root}.")
    validation = texts[::10]
    del texts[::10]
    return b"".join(texts), b"".join(validation)


def repeat(batches: DataLoader[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches for ever; each round through the data is shuffled anew."""
    while True:
        yield from batches


def warmup_then_cosine(step: int, steps: int) -> float:
    """Return the part of the full learning rate to use: up in the first tenth, then down to a tenth."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * min(step / steps, 1)))


def next_byte_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def validate(runtime: Runtime, model: nn.Module, batches: DataLoader[tuple[Tensor, Tensor]]) -> float:
    model.eval()
    losses = torch.stack([next_byte_loss(model, inputs, targets) for inputs, targets in batches])
    model.train()
    return runtime.all_reduce(losses.mean()).item()


@torch.no_grad()
def write(model: nn.Module, prompt: str, num_bytes: int, context: int, device: torch.device) -> str:
    """Let the model go on from `prompt`, byte by byte; the same bytes each time, on every process."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    # The model may choose among the bytes that a terminal shows: ASCII without control characters, and the newline.
    hidden = torch.tensor([not (32 <= byte < 127 or byte == ord("\n")) for byte in range(256)])
    tokens = torch.tensor([list(prompt.encode())], device=device)
    for _ in range(num_bytes):
        logits = model(tokens[:, -context:])[0, -1].float().cpu().masked_fill(hidden, -math.inf)
        token = torch.multinomial(torch.softmax(logits / 0.7, dim=-1), 1, generator=generator)
        tokens = torch.cat((tokens, token.to(device)[None]), dim=1)
    return bytes(tokens[0].tolist()).decode("ascii")


def save_losses(path: Path, losses: list[float], validation: dict[int, float]) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("step", "loss", "validation"))
        rows.writerows((step, loss, validation.get(step, "")) for step, loss in enumerate(losses, start=1))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small GPT on the source code of Python itself.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="small", help="size of the model")
    add("--accelerator", default="auto", help="cpu or cuda; auto takes cuda where there is one")
    add("--strategy", default="auto", help="single_device, ddp or fsdp")
    add("--precision", default="32-true", help="32-true, 64-true, bf16-true, 16-true, bf16-mixed or 16-mixed")
    add("--steps", type=int, default=700, help="steps in all, those before a --resume included")
    add("--batch-size", type=int, default=8, help="windows of text in a step, over all processes")
    add("--learning-rate", type=float, help="the highest of the schedule; None takes 0.5 / width of the model")
    add("--seed", type=int, default=1, help="seed of the weights and the order of the data")
    add("--out", type=Path, default=Path("runs/train_gpt"), help="folder for the checkpoint, losses and plot")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--checkpoint-every", type=int, default=200, help="steps between two checkpoints")
    add("--validate-every", type=int, default=100, help="steps between two validations")
    add("--stop-after", type=int, help="stop early, after this step of --steps; --resume takes it up again")
    add("--sample-bytes", type=int, default=400, help="bytes of text to write at the end")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
