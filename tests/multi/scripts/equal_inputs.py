"""Data that nobody has split: the first training step in which all ranks have the same inputs warns, once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nucleate import Runtime
from tests.multi.device import accelerator

runtime = Runtime(accelerator=accelerator(), strategy="ddp")
runtime.launch()
rank = runtime.global_rank
data = TensorDataset(torch.arange(24.0).view(12, 2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Any, scale: float = 1.0, **more: Any) -> Any:
        return self.layer(x) * scale


def warned(loop: Callable[[Any], None]) -> list[str]:
    """Return the warnings of all ranks in a training loop of a new model."""
    model = runtime.setup(Net())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop(model)
    runtime.barrier()
    every: list[Any] = [None, None]
    mine = [str(one.message) for one in caught if "same inputs" in str(one.message)]
    torch.distributed.all_gather_object(every, mine)
    return [text for texts in every for text in texts]


def train(model: Any, *args: Any, **kwargs: Any) -> None:
    runtime.backward(model(*args, **kwargs).sum())


def raw(model: Any) -> None:
    my_loader = DataLoader(data, 2)
    for (batch,) in my_loader:
        train(model, batch)


def prepared(model: Any) -> None:
    for (batch,) in runtime.setup_dataloaders(DataLoader(data, 2)):
        train(model, batch)


def equal_in_a_loop_over_a_prepared_loader(model: Any) -> None:
    for _ in runtime.setup_dataloaders(DataLoader(data, 2)):
        train(model, torch.ones(2, 2))


def different(model: Any) -> None:
    for number in range(3):
        batch = torch.zeros(100, 2)
        batch[57, 1] = rank * 2.0**-20 + number
        train(model, batch)


def different_in_plain_values(model: Any) -> None:
    train(model, torch.ones(2, 2), scale=float(rank))
    train(model, torch.ones(2 + rank, 2))
    train(model, torch.ones(2, 2), names=[object()])


def equal_later(model: Any) -> None:
    for number in range(5):
        train(model, torch.full((2, 2), float(rank * (number < 3))))


def evaluated(model: Any) -> None:
    with torch.no_grad():
        model(torch.ones(2, 2))
    model.eval()
    model(torch.ones(2, 2))


(text,) = warned(raw)
assert "all 2 data parallel ranks gave Net the same inputs in training forward 1" in text, text
assert "equal_inputs.py:" in text, text
assert "The DataLoader 'my_loader' was not given" in text, text
for loop in (
    prepared,
    equal_in_a_loop_over_a_prepared_loader,
    different,
    different_in_plain_values,
    equal_later,
    evaluated,
):
    found = warned(loop)
    assert not found, (loop, found)


def alone(model: Any) -> None:
    if rank == 0:
        with runtime.no_backward_sync(model):
            train(model, torch.ones(2, 2))


assert not warned(alone)  # Nobody waits.
runtime = Runtime(accelerator=accelerator(), strategy="fsdp")
(text,) = warned(raw)
assert "gave Net the same" in text, text  # FSDP changes the class of the model.
print("noticed", flush=True)
