"""Finetune a trained GPT for another task: which bytes of a program are comments?

    python examples/02_finetune.py                                         # starts from what 01_train_gpt.py saved
    python examples/02_finetune.py --weights model.safetensors             # or any other file or folder of its weights
    python examples/02_finetune.py --frozen --mmap                         # only the new head learns
    torchrun --nproc-per-node 2 examples/02_finetune.py --strategy fsdp    # each process reads its part of the file

Without weights it starts from random ones, and learns more slowly: `--weights none` shows by how much.
"""

from __future__ import annotations

import argparse
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt import GPT, SIZES, GPTConfig
from nucleate import Runtime
from nucleate.checkpoint import add_prefix
from nucleate.report import progress


class Tagger(nn.Module):
    """A GPT with another head: for each byte, is it part of a comment?"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gpt = GPT(config)
        self.gpt.head = nn.Linear(config.dim, 2)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, time) -> (batch, time, 2)
        return self.gpt(tokens)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    config = SIZES[args.size]
    runtime = Runtime(accelerator=args.accelerator, strategy=args.strategy, precision=args.precision)
    runtime.launch()
    runtime.seed_everything(args.seed)

    # Nothing is made and nothing is read yet: each parameter is a recipe, or a slice of a file.
    with runtime.init_module(empty_init=True):
        model = Tagger(config)
    if args.weights != "none":
        with warnings.catch_warnings():
            # The head is not in the file as it is here; it says so, and the head is made by its recipe.
            warnings.simplefilter("ignore", UserWarning)
            # The weights are those of `GPT`, which is the part called `gpt` here.
            report = runtime.load_raw(
                args.weights, model, strict=False, keys=add_prefix("gpt."), mmap=args.mmap and runtime.world_size == 1
            )
        runtime.print(report)
        if len(report.missing) > 1:
            raise SystemExit(f"{args.weights} is not a GPT of size {args.size}.")
    if args.frozen:
        model.requires_grad_(False)
        model.gpt.head.requires_grad_(True)
    # Now each is made once, where it will live, only what this process owns.
    model = runtime.setup(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.learning_rate)
    optimizer = runtime.setup_optimizers(optimizer)

    windows = read_windows(config.context, args.batch_size * args.steps)
    batch_size = args.batch_size // runtime.world_size
    losses: list[float] = []
    steps = progress(range(args.steps), enabled=runtime.is_global_zero)
    for step in steps:
        first = step * args.batch_size + runtime.global_rank * batch_size
        tokens = runtime.to_device(windows[first : first + batch_size].long())
        targets = in_comment(tokens)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        runtime.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(runtime.all_reduce(loss.detach()).item())
        steps.show(loss=f"{losses[-1]:.3f}")
    last = losses[-max(1, args.steps // 10) :]
    runtime.print(f"loss {losses[0]:.3f} at first, {sum(last) / len(last):.3f} at the end")

    # One file that everybody reads, written by all processes together. Or a folder, with format="safetensors".
    runtime.save(args.out, model)
    runtime.print(f"Wrote {args.out}")


def read_windows(length: int, count: int) -> Tensor:
    """Return stretches `(count, length)` of the standard library of the Python that runs this."""
    root = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(root.glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    starts = torch.randint(len(text) - length, (count,), generator=torch.Generator().manual_seed(0))
    return torch.stack([data[start : start + length] for start in starts.tolist()])


def in_comment(tokens: Tensor) -> Tensor:
    """Return 1 for each byte between a `#` and the end of its line."""
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    last_hash = places.masked_fill(tokens != ord("#"), -1).cummax(1).values
    last_newline = places.masked_fill(tokens != ord("\n"), -1).cummax(1).values
    return (last_hash > last_newline).long()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Finetune a trained GPT for another task.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--weights", default="runs/train_gpt/checkpoint", help="a checkpoint of any format, or none")
    add("--size", choices=SIZES, default="small", help="size of the model; that of the weights")
    add("--accelerator", default="auto", help="cpu or cuda; auto takes cuda where there is one")
    add("--strategy", default="auto", help="single_device, ddp or fsdp")
    add("--precision", default="32-true", help="32-true, bf16-true, bf16-mixed, ...")
    add("--frozen", action="store_true", help="train the new head only")
    add("--mmap", action="store_true", help="let frozen weights lie in the file's own pages")
    add("--steps", type=int, default=60, help="how many")
    add("--batch-size", type=int, default=8, help="windows of text in a step, over all processes")
    add("--learning-rate", type=float, default=1e-3, help="of AdamW")
    add("--seed", type=int, default=1, help="seed of the new head")
    add("--out", type=Path, default=Path("runs/finetune.safetensors"), help="where the result goes")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
