"""Classify images: a small convolutional network reads handwritten digits.

    python examples/04_image_classifier.py
    torchrun --nproc-per-node 2 examples/04_image_classifier.py --strategy ddp
    torchrun --nproc-per-node 2 examples/04_image_classifier.py --strategy fsdp --precision bf16-mixed

Accuracy is counted on images that no training saw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from digits import split_digits
from nucleate import Runtime
from options import parser_of


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--epochs", type=int, default=8, help="rounds through the data")
    parser.add_argument("--out", default="runs/classifier.safetensors", help="where the weights go")
    args = parser.parse_args(argv)
    runtime = Runtime(accelerator=args.accelerator, strategy=args.strategy, precision=args.precision)
    runtime.launch()
    runtime.seed_everything(args.seed)

    training, held_out = split_digits()
    batch_size = 64 // runtime.world_size  # the processes share a batch of 64
    batches, held_out_batches = runtime.setup_dataloaders(
        DataLoader(training, batch_size, shuffle=True), DataLoader(held_out, batch_size)
    )

    with runtime.init_module():
        model: nn.Module = classifier()
    optimizer: Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer = runtime.setup(model, optimizer)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.7)

    for epoch in range(1, args.epochs + 1):
        for images, digits in batches:
            loss = F.cross_entropy(model(images), digits)
            runtime.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
        mean_loss = float(runtime.all_reduce(loss.detach()))
        accuracy = accuracy_of(runtime, model, held_out_batches)
        runtime.print(f"epoch {epoch}: loss of the last batch {mean_loss:.3f}, held-out accuracy {accuracy:.3f}")

    runtime.save(args.out, model)
    runtime.print(f"Wrote {args.out}")


def classifier() -> nn.Module:
    """Return a network from images `(batch, 1, 8, 8)` to the logits of ten digits `(batch, 10)`."""
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.GELU(),
        nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(64 * 4 * 4, 10),
    )


@torch.no_grad()
def accuracy_of(runtime: Runtime, model: nn.Module, batches: DataLoader[tuple[Tensor, Tensor]]) -> float:
    """Return the part of the images that the model reads right, over all processes."""
    model.eval()
    right = torch.cat([(model(images).argmax(dim=1) == digits).float() for images, digits in batches])
    model.train()
    return float(runtime.all_reduce(right.mean()))


if __name__ == "__main__":
    main()
