"""Learn to learn (MAML): after training on tasks with the digits 0 to 6, a few images of 7, 8 and 9 are enough.

    python examples/07_meta_learning.py
    torchrun --nproc-per-node 2 examples/07_meta_learning.py --strategy ddp

A task shows five images of each of three digits. A few steps of gradient descent adapt the network to them. The outer
loop trains the weights that these steps start from, through the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.optim import Optimizer

from digits import read_digits
from nucleate import Runtime
from options import parser_of

NUM_WAYS, NUM_SHOTS, NUM_QUERIES = 3, 5, 10


class Adapting(nn.Module):
    """A network whose forward first adapts a copy of its weights to the images of a task.

    The inner loop is a part of the forward. So a strategy sees an ordinary module: it averages the gradients of the
    outer loop, and gathers sharded weights before the inner loop begins.
    """

    def __init__(self, num_steps: int, step_size: float) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.step_size = step_size
        self.network = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, NUM_WAYS)
        )

    def forward(self, shown: Tensor, answers: Tensor, asked: Tensor) -> Tensor:
        """Return logits `(tasks, queries, ways)`; `shown` and `asked` are `(tasks, images, 64)`."""
        return torch.vmap(self.adapt_and_answer)(shown, answers, asked)

    def adapt_and_answer(self, shown: Tensor, answers: Tensor, asked: Tensor) -> Tensor:
        def logits(weights: dict[str, Tensor], images: Tensor) -> Tensor:
            return cast(Tensor, functional_call(self.network, weights, (images,)))

        def loss(weights: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(logits(weights, shown), answers)

        weights: dict[str, Tensor] = dict(self.network.named_parameters())
        for _ in range(self.num_steps):
            slopes = grad(loss)(weights)
            weights = {name: weight - self.step_size * slopes[name] for name, weight in weights.items()}
        return logits(weights, asked)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--iterations", type=int, default=400, help="steps of the outer loop")
    parser.add_argument("--tasks", type=int, default=8, help="tasks in a step, over all processes")
    args = parser.parse_args(argv)
    runtime = Runtime(accelerator=args.accelerator, strategy=args.strategy, precision=args.precision)
    runtime.launch()
    runtime.seed_everything(args.seed)
    if args.tasks % runtime.world_size:
        raise SystemExit(f"--tasks {args.tasks} must be a multiple of the {runtime.world_size} processes.")

    with runtime.init_module():
        model: nn.Module = Adapting(num_steps=3, step_size=0.1)
    optimizer: Optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model, optimizer = runtime.setup(model, optimizer)

    images, digits = read_digits()
    by_digit = [images[digits == digit] for digit in range(10)]
    new_digits = by_digit[7:]
    # Seven digits are few. Turned and mirrored they are 56 shapes to learn from.
    turned = [torch.rot90(images, turns, (2, 3)) for images in by_digit[:7] for turns in range(4)]
    shapes = turned + [images.transpose(2, 3) for images in turned]
    runtime.print(f"accuracy on new digits before training: {judge(runtime, model, new_digits):.3f}")
    random = torch.Generator().manual_seed(args.seed + runtime.global_rank)  # each process has tasks of its own
    for iteration in range(1, args.iterations + 1):
        shown, answers, asked, truth = runtime.to_device(tasks(shapes, args.tasks // runtime.world_size, random))
        loss = F.cross_entropy(model(shown, answers, asked).flatten(0, 1), truth.flatten())
        runtime.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if iteration % 100 == 0:
            runtime.print(f"iteration {iteration}: loss after adapting {float(runtime.all_reduce(loss.detach())):.3f}")
    runtime.print(f"accuracy on new digits after training: {judge(runtime, model, new_digits):.3f}")


def tasks(shapes: list[Tensor], count: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `count` tasks, stacked: images that are shown, their answers, images that are asked, and the truth."""
    shown, asked = [], []
    for _ in range(count):
        ways = torch.randperm(len(shapes), generator=random)[:NUM_WAYS].tolist()
        for images in (shapes[way].flatten(1) for way in ways):
            chosen = images[torch.randperm(len(images), generator=random)[: NUM_SHOTS + NUM_QUERIES]]
            shown.append(chosen[:NUM_SHOTS])
            asked.append(chosen[NUM_SHOTS:])
    answers = torch.arange(NUM_WAYS).repeat_interleave(NUM_SHOTS).expand(count, -1)
    truth = torch.arange(NUM_WAYS).repeat_interleave(NUM_QUERIES).expand(count, -1)
    return torch.cat(shown).view(count, -1, 64), answers, torch.cat(asked).view(count, -1, 64), truth


@torch.no_grad()
def judge(runtime: Runtime, model: nn.Module, by_digit: list[Tensor]) -> float:
    """Return the accuracy after adapting, on 40 tasks that are the same each time and on every process."""
    shown, answers, asked, truth = runtime.to_device(tasks(by_digit, 40, torch.Generator().manual_seed(0)))
    model.eval()
    right = model(shown, answers, asked).argmax(dim=-1) == truth
    model.train()
    return float(right.float().mean())


if __name__ == "__main__":
    main()
