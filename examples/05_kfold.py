"""Judge a model by k-fold cross-validation: each image is held out once, by a model that was trained on the others.

    python examples/05_kfold.py
    torchrun --nproc-per-node 2 examples/05_kfold.py --strategy fsdp

The mean and the deviation over the folds say how well the model reads images it has not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset, TensorDataset

from digits import read_digits
from nucleate import Runtime
from options import parser_of


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--folds", type=int, default=5, help="into how many parts the data is split")
    parser.add_argument("--epochs", type=int, default=8, help="rounds through the data of each fold")
    args = parser.parse_args(argv)
    runtime = Runtime(accelerator=args.accelerator, strategy=args.strategy, precision=args.precision)
    runtime.launch()

    data = TensorDataset(*read_digits())
    accuracies: list[float] = []
    for held_out in folds(len(data), args.folds):
        runtime.seed_everything(args.seed)  # all folds start from the same weights
        accuracies.append(train_and_judge(runtime, data, held_out, args.epochs))
        runtime.print(f"fold {len(accuracies)} of {args.folds}: held-out accuracy {accuracies[-1]:.3f}")
    mean, deviation = torch.tensor(accuracies).mean(), torch.tensor(accuracies).std()
    runtime.print(f"accuracy over {args.folds} folds: {mean:.3f} +- {deviation:.3f}")


def folds(num_samples: int, num_folds: int) -> Iterator[list[int]]:
    """Yield the indices of each part; the parts differ in size by one sample at most."""
    if not 2 <= num_folds <= num_samples:
        raise SystemExit(f"--folds {num_folds} must be from 2 to {num_samples}, the number of images.")
    for first in range(num_folds):
        yield list(range(first, num_samples, num_folds))  # the data is shuffled


def train_and_judge(runtime: Runtime, data: TensorDataset, held_out: list[int], epochs: int) -> float:
    """Train a new model without the samples `held_out`, and return its accuracy on them."""
    rest = sorted(set(range(len(data))) - set(held_out))
    batches = runtime.setup_dataloaders(DataLoader(Subset(data, rest), 64 // runtime.world_size, shuffle=True))
    with runtime.init_module():
        model: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
    optimizer: Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer = runtime.setup(model, optimizer)
    for _ in range(epochs):
        for images, digits in batches:
            runtime.backward(F.cross_entropy(model(images), digits))
            optimizer.step()
            optimizer.zero_grad()

    # Parts are of any size: each process judges every n-th sample, and counts are summed. All call the model equally
    # often, as fsdp requires, because each has one batch.
    mine = held_out[runtime.global_rank :: runtime.world_size]
    images, digits = runtime.to_device(data[mine])
    with torch.no_grad():
        right = (model(images).argmax(dim=1) == digits).sum()
    counts: Tensor = runtime.all_reduce(
        torch.stack((right, torch.tensor(len(mine), device=right.device))), reduce_op="sum"
    )
    return float(counts[0] / counts[1])


if __name__ == "__main__":
    main()
