"""Build your own trainer on a Runtime: callbacks, validation, checkpoints and exact resuming.

    python examples/09_trainer.py
    python examples/09_trainer.py --resume --epochs 16      # more epochs, from the checkpoint
    torchrun --nproc-per-node 2 examples/09_trainer.py --strategy fsdp

`Trainer` knows no model. A model says in `training_step` and `validation_step` how it learns and how it is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from digits import split_digits
from nucleate import RandomState, Runtime
from options import parser_of

Batch = list[Tensor]


class Task(nn.Module):
    """A model that knows how it learns. Subclasses implement the three methods."""

    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        raise NotImplementedError

    def validation_step(self, batch: Batch) -> dict[str, Tensor]:
        """Return figures of a batch by name; the trainer averages them over batches and processes."""
        raise NotImplementedError

    def configure_optimizer(self) -> Optimizer:
        """Return the optimizer of the parameters. They may still be deferred."""
        raise NotImplementedError


class Callback:
    """Something to do beside training. Every process calls it."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Called after each epoch; its figures are the last of `trainer.history`."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """Called once, after the last epoch."""


class Trainer:
    """Trains a task, and goes on exactly where an interrupted run has stopped.

    Args:
        runtime: Where and how to train.
        folder: Where the checkpoint goes.
        callbacks: Called in this order.
    """

    def __init__(self, runtime: Runtime, folder: Path, callbacks: Sequence[Callback] = ()) -> None:
        self.runtime = runtime
        self.folder = folder
        self.callbacks = callbacks
        self.history: list[dict[str, float]] = []  # the figures of each epoch
        self.should_stop = False  # a callback may set it

    def fit(
        self,
        make_task: Callable[[], Task],
        training: DataLoader[Any],
        validation: DataLoader[Any],
        *,
        epochs: int,
        resume: bool = False,
    ) -> None:
        """Train for `epochs` in all, those before a resume included.

        Args:
            make_task: The constructor of the task. The trainer calls it where no weight is allocated yet.
            training: What to learn from.
            validation: What to judge by, after each epoch.
            epochs: The number of rounds through `training`.
            resume: Whether to start from the checkpoint in `folder`.
        """
        runtime = self.runtime
        with runtime.init_module(empty_init=True):
            task = make_task()
        model, optimizer = runtime.setup(task, task.configure_optimizer())
        # These methods are called from outside: they go through precision and strategy, as forward does.
        model.mark_forward_method("training_step")
        model.mark_forward_method("validation_step")
        training, validation = runtime.setup_dataloaders(training, validation)
        state: dict[str, Any] = {
            "model": model,
            "optimizer": optimizer,
            "training": training,  # the order of the next epoch
            "random": RandomState(),  # for dropout
            "history": self.history,
        }
        if resume:
            runtime.load(self.folder / "checkpoint", state)
            self.history = state["history"]
        while len(self.history) < epochs and not self.should_stop:
            loss = self._train(model, optimizer, training)
            self.history.append({"loss": loss, **self._validate(model, validation)})
            runtime.save(self.folder / "checkpoint", {**state, "history": self.history})
            for callback in self.callbacks:
                callback.on_epoch_end(self)
        for callback in self.callbacks:
            callback.on_fit_end(self)

    def _train(self, model: Any, optimizer: Optimizer, batches: DataLoader[Any]) -> float:
        losses = []
        for batch in batches:
            loss = model.training_step(batch)
            self.runtime.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return float(self.runtime.all_reduce(torch.stack(losses).mean()))

    @torch.no_grad()
    def _validate(self, model: Any, batches: DataLoader[Any]) -> dict[str, float]:
        model.eval()
        figures = [model.validation_step(batch) for batch in batches]
        model.train()
        means = {name: torch.stack([each[name] for each in figures]).mean() for name in figures[0]}
        return {name: float(mean) for name, mean in self.runtime.all_reduce(means).items()}


class PrintFigures(Callback):
    """Prints a line for each epoch."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in trainer.history[-1].items())
        trainer.runtime.print(f"epoch {len(trainer.history)}: {figures}")


class StopEarly(Callback):
    """Stops when a figure has not become better for some epochs."""

    def __init__(self, figure: str, patience: int) -> None:
        self.figure = figure
        self.patience = patience

    def on_epoch_end(self, trainer: Trainer) -> None:
        values = [epoch[self.figure] for epoch in trainer.history]
        trainer.should_stop = len(values) - 1 - values.index(max(values)) >= self.patience


class ReadDigits(Task):
    """Learns to read handwritten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 128),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Linear(128, 128),
            nn.GELU(),
            nn.Linear(128, 10),
        )

    def training_step(self, batch: Batch) -> Tensor:
        images, digits = batch
        return F.cross_entropy(self.layers(images), digits)

    def validation_step(self, batch: Batch) -> dict[str, Tensor]:
        images, digits = batch
        return {"accuracy": (self.layers(images).argmax(dim=1) == digits).float().mean()}

    def configure_optimizer(self) -> Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(argv: Sequence[str] | None = None) -> Trainer:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--epochs", type=int, default=12, help="rounds through the data, those before a --resume included"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/trainer"), help="folder for the checkpoint")
    args = parser.parse_args(argv)
    runtime = Runtime(accelerator=args.accelerator, strategy=args.strategy, precision=args.precision)
    runtime.launch()
    runtime.seed_everything(args.seed)
    training, held_out = split_digits()
    batch_size = 60 // runtime.world_size
    trainer = Trainer(runtime, args.out, callbacks=[PrintFigures(), StopEarly("accuracy", patience=5)])
    trainer.fit(
        ReadDigits,
        DataLoader(training, batch_size, shuffle=True),
        DataLoader(held_out, batch_size),
        epochs=args.epochs,
        resume=args.resume,
    )
    runtime.print(f"best held-out accuracy: {max(epoch['accuracy'] for epoch in trainer.history):.3f}")
    return trainer


if __name__ == "__main__":
    main()
