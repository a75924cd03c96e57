"""Models in plain torch with what constructors usually do: masks, position tables, initializers, parametrizations.

Tables have usual sizes, larger than what is looked at by making it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune


class CausalAttention(nn.Module):
    """As nanoGPT has it."""

    def __init__(self, width: int = 32, context: int = 1024) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.register_buffer("mask", torch.tril(torch.ones(context, context)).view(1, 1, context, context))
        self.register_buffer("bias", torch.triu(torch.full((context, context), float("-inf")), diagonal=1))
        self.register_buffer("hidden", torch.ones(context, context).tril().bool().logical_not())


class GPT(nn.Module):
    """GPT-2's initialization: scaled normals for what ends a residual branch, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(500, 32)
        self.positions = nn.Embedding(1024, 32)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(32), CausalAttention(), nn.LayerNorm(32), nn.Linear(32, 128)]) for _ in range(2)
        )
        self.head = nn.Linear(32, 500, bias=False)
        self.head.weight = self.tokens.weight
        self.apply(self._init)
        for name, parameter in self.named_parameters():
            if name.endswith("out.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(4))

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class Rotary(nn.Module):
    """Tables of angles, in the three ways in which Llamas have them."""

    def __init__(self, width: int = 64, context: int = 4096) -> None:
        super().__init__()
        frequencies = 1.0 / (10000 ** (torch.arange(0, width, 2)[: width // 2].float() / width))
        angles = torch.outer(torch.arange(context, dtype=torch.float32), frequencies)
        self.register_buffer("rotations", torch.polar(torch.ones_like(angles), angles))
        doubled = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", doubled.cos()[None, None], persistent=False)
        self.register_buffer("sin", doubled.sin().to(torch.bfloat16), persistent=False)
        repeated = angles.repeat(1, 2)
        self.register_buffer("pairs", torch.stack([repeated.cos(), repeated.sin()], dim=-1).bfloat16())
        products = torch.einsum("i,j->ij", torch.arange(context).float(), frequencies)
        self.register_buffer("products", products.float() * 0.5)


class Llama(nn.Module):
    """A decoder of `nn.RMSNorm` and `nn.Linear` with a scaled initialization."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary = Rotary()
        self.embedding = nn.Embedding(500, 32, padding_idx=0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.RMSNorm(32), "up": nn.Linear(32, 88, bias=False), "down": nn.Linear(88, 32)})
            for _ in range(2)
        )
        for depth, layer in enumerate(self.layers):
            nn.init.trunc_normal_(layer["up"].weight, std=0.02)  # type: ignore[index]
            with torch.no_grad():
                layer["down"].weight.div_(math.sqrt(2.0 * (depth + 1)))  # type: ignore[index]


class Positions(nn.Module):
    """Sines and cosines side by side, as in torch's tutorial, and slopes as in ALiBi."""

    def __init__(self, width: int = 64, context: int = 5000, heads: int = 8) -> None:
        super().__init__()
        position = torch.arange(context).unsqueeze(1)
        term = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        table = torch.zeros(context, 1, width)
        table[:, 0, 0::2] = torch.sin(position * term)
        table[:, 0, 1::2] = torch.cos(position * term)
        self.register_buffer("table", table)
        slopes = torch.pow(2, -torch.arange(1, heads + 1) * 8 / heads).view(heads, 1, 1)
        distance = torch.arange(512)[None, :] - torch.arange(512)[:, None]
        self.register_buffer("alibi", slopes * distance.abs().neg().unsqueeze(0))
        self.register_buffer("ids", torch.arange(context).expand((1, -1)))
        buckets = torch.where(distance > 0, distance, torch.zeros_like(distance)).clamp(max=31)
        self.register_buffer("buckets", buckets)


class Window(nn.Module):
    """Relative positions and shifted windows, as in Swin."""

    def __init__(self, size: int = 12, resolution: int = 48) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros((2 * size - 1) ** 2, 4))
        grid = torch.stack(torch.meshgrid([torch.arange(size), torch.arange(size)], indexing="ij"))
        flat = torch.flatten(grid, 1)
        relative = (flat[:, :, None] - flat[:, None, :]).permute(1, 2, 0).contiguous()
        relative[:, :, 0] += size - 1
        relative[:, :, 1] += size - 1
        relative[:, :, 0] *= 2 * size - 1
        self.register_buffer("index", relative.sum(-1))
        nn.init.trunc_normal_(self.table, std=0.02)
        image = torch.zeros((1, resolution, resolution, 1))
        image[:, :size, :, :] = 1
        windows = image.view(1, resolution // size, size, resolution // size, size, 1).permute(0, 1, 3, 2, 4, 5)
        windows = windows.contiguous().view(-1, size * size)
        mask = windows.unsqueeze(1) - windows.unsqueeze(2)
        self.register_buffer("mask", mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0))


class ViT(nn.Module):
    """Patches, a class token and an encoder of torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, 48))
        self.positions = nn.Parameter(torch.randn(1, 1025, 48) * 0.02)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(48, 4, 96, batch_first=True), 2)
        nn.init.normal_(self.token, std=1e-6)
        fan_in = math.prod(self.patches.weight.shape[1:])
        nn.init.trunc_normal_(self.patches.weight, std=math.sqrt(1 / fan_in))
        self.patches.weight.data = self.patches.weight.data.flatten(1).contiguous().view_as(self.patches.weight)


class Mamba(nn.Module):
    """The state space model's own initializers."""

    def __init__(self, width: int = 512, states: int = 64) -> None:
        super().__init__()
        decay = torch.arange(1, states + 1, dtype=torch.float32).repeat(width, 1).contiguous()
        self.decay = nn.Parameter(torch.log(decay))
        self.skip = nn.Parameter(torch.ones(width))
        self.step = nn.Linear(32, width)
        nn.init.uniform_(self.step.weight, -0.1, 0.1)
        step = torch.exp(torch.rand(width) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
        with torch.no_grad():
            self.step.bias.copy_(step + torch.log(-torch.expm1(-step)))
        self.convolution = nn.Conv1d(width, width, 4, groups=width, padding=3)


class Recurrent(nn.Module):
    """Recurrent layers with orthogonal weights and forget gates that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(24, 96, 2, bidirectional=True)
        self.gru = nn.GRU(24, 32, batch_first=True)
        for name, parameter in self.lstm.named_parameters():
            if "weight_hh" in name:
                nn.init.orthogonal_(parameter)
            elif "weight_ih" in name:
                nn.init.xavier_uniform_(parameter)
            else:
                parameter.data.zero_()
                parameter.data[96:192].fill_(1)


class Policy(nn.Module):
    """A network for reinforcement learning: orthogonal layers, and a log of deviations."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(300, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 6))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, math.sqrt(2))
                nn.init.constant_(layer.bias, 0.0)
        self.deviation = nn.Parameter(torch.ones(6) * -0.5)


class Parametrized(nn.Module):
    """Weights that are computed from others."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Conv1d(64, 96, 7))
        self.before = nn.utils.weight_norm(nn.Linear(200, 300)) if hasattr(nn.utils, "weight_norm") else None
        self.spectral = parametrizations.spectral_norm(nn.Linear(200, 300))
        self.orthogonal = parametrizations.orthogonal(nn.Linear(130, 130))
        self.pruned = nn.Linear(200, 300)
        prune.l1_unstructured(self.pruned, "weight", amount=0.3)  # type: ignore[no-untyped-call]
        prune.random_unstructured(self.pruned, "bias", amount=0.3)  # type: ignore[no-untyped-call]


class Spectrogram(nn.Module):
    """What audio models make of windows, filters and transforms."""

    def __init__(self, length: int = 400, filters: int = 80) -> None:
        super().__init__()
        window = torch.hann_window(length)
        steps = torch.arange(length).float()
        angles = 2 * math.pi * torch.outer(torch.arange(length // 2 + 1).float(), steps) / length
        self.register_buffer("real", (torch.cos(angles) * window).unsqueeze(1))
        self.register_buffer("imaginary", (-torch.sin(angles) * window).unsqueeze(1))
        centers = torch.linspace(0, 8000, filters + 2)
        slopes = centers.unsqueeze(0) - torch.linspace(0, 8000, length // 2 + 1).unsqueeze(1)
        down, up = -slopes[:, :-2] / centers.diff()[:-1], slopes[:, 2:] / centers.diff()[1:]
        self.register_buffer("bank", torch.clamp(torch.minimum(down, up), min=0.0))
        self.features = nn.Parameter(torch.randn(256, 128) * 16, requires_grad=False)


class ConvNet(nn.Module):
    """Convolutions, norms and an initialization by fan-out; a layer whose width a dry run tells."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 16, 8, 4),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, 2),
            nn.GroupNorm(4, 32),
            nn.Hardswish(),
            nn.MaxPool2d(2),
        )
        for module in self.body:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        with torch.no_grad():
            width = self.body(torch.zeros(1, 4, 84, 84)).flatten(1).shape[1]
        self.head = nn.Linear(width, 6)


class LoRA(nn.Module):
    """A low-rank update of a frozen layer in another dtype, with a scaled copy of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(200, 300).to(torch.bfloat16).requires_grad_(False)
        self.first = nn.Parameter(torch.empty(8, 200))
        self.second = nn.Parameter(torch.zeros(300, 8))
        nn.init.kaiming_uniform_(self.first, a=math.sqrt(5))
        self.scaled = nn.Parameter(self.base.weight.detach().float() * 0.5)
        norms = self.base.weight.float().norm(dim=1, keepdim=True)
        self.direction = nn.Parameter(self.base.weight.float() / norms)
        self.centered = nn.Parameter(self.scaled.detach() - self.scaled.detach().mean(dim=0))


def _attention() -> nn.Module:
    return nn.ModuleList([nn.MultiheadAttention(64, 4, kdim=32, vdim=48), nn.Transformer(32, 4, 2, 2, 64)])


def _seen() -> nn.Module:
    module = nn.Linear(300, 200)
    deviations: Tensor = module.weight.std(dim=1)
    assert deviations.shape == (200,)
    assert float(module.weight.abs().max()) < 1
    return module


MODELS: dict[str, Callable[[], nn.Module]] = {
    "GPT": GPT, "Llama": Llama, "Positions": Positions, "Window": Window, "ViT": ViT, "Mamba": Mamba,
    "Recurrent": Recurrent, "Policy": Policy, "Parametrized": Parametrized, "Spectrogram": Spectrogram,
    "ConvNet": ConvNet, "LoRA": LoRA, "attention": _attention, "values that are looked at": _seen,
    "Sequential": lambda: nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200), nn.Embedding(300, 200)),
}  # fmt: skip
