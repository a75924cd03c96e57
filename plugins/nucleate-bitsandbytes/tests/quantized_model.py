"""A small model for tests on several ranks: blocks of quantized layers, with norms, biases and adapters that train."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Adapter(nn.Module):
    """Adds the output of two small layers to that of a frozen layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = frozen(base)
        self.a = nn.Linear(base.in_features, 4, bias=False)
        self.b = nn.Linear(4, base.out_features, bias=False)
        nn.init.normal_(self.a.weight, std=0.1)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.b(self.a(x))
        return out


def frozen(layer: nn.Linear) -> nn.Linear:
    """Freeze a layer's weight, which is therefore quantized; its bias trains."""
    layer.weight.requires_grad_(False)
    return layer


class Block(nn.Module):
    """A residual block with two layers whose codes and scales are uneven on two ranks.

    What trains is even: where a shard ends, torch's vectorized optimizers round otherwise than in the middle.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(192)
        self.up = Adapter(nn.Linear(192, 320))
        self.odd = frozen(nn.Linear(320, 33, bias=False))
        self.down = frozen(nn.Linear(33, 192, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.odd(torch.relu(self.up(self.norm(x)))))
        return out


class Model(nn.Module):
    """Blocks between an embedding and a head that is not quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 192)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(192, 60, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        out: Tensor = self.lm_head(hidden)
        return out


TOKENS = torch.arange(24).view(2, 12)


def history(runtime, model) -> list[Tensor]:
    """Use a model that is set up as users do, and return every output: eval, training, eval again."""
    outputs = []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = runtime.setup_optimizers(torch.optim.SGD(trained, lr=0.1))
    for _ in range(2):
        with torch.no_grad():
            outputs += [model.eval()(TOKENS).clone() for _ in range(2)]
        for _ in range(2):
            output = model.train()(TOKENS)
            outputs.append(output.detach().clone())
            runtime.backward(output.float().square().mean())
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        outputs.append(model.eval()(TOKENS).clone())
    return outputs


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with whole tensors."""
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for name, t in state.items()}
