"""A small model, adapters for it that are made of linear layers, and their training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Model(nn.Module):
    """Two linear layers between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 192)
        self.up = nn.Linear(192, 320)
        self.down = nn.Linear(320, 192, bias=False)
        self.lm_head = nn.Linear(192, 50, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        out: Tensor = self.lm_head(hidden + self.down(torch.relu(self.up(hidden))))
        return out


class Lora(nn.Module):
    """Adds the output of two small layers to that of a layer, as PEFT's LoRA does."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base: Any = base
        self.a = nn.Linear(base.in_features, 8, bias=False)
        self.b = nn.Linear(8, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.b(self.a(x))
        return out


#: The names of the parameters that `adapted` adds.
ADAPTERS = {f"{layer}.{part}.weight" for layer in ("up", "down") for part in "ab"}
TOKENS = torch.arange(40).view(4, 10)


def adapted(model: Any) -> nn.Module:
    """Put adapters around the linear layers of a model."""
    model.up, model.down = Lora(model.up), Lora(model.down)
    return model  # type: ignore[no-any-return]


def train(runtime: Any, model: Any) -> list[float]:
    """Train what requires gradients for 20 steps of AdamW, and return the losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = runtime.setup_optimizers(torch.optim.AdamW(trained, lr=1e-2))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten().roll(-1))
        runtime.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses
