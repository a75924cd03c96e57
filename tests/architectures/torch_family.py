"""Every module class of torch.nn with sensible arguments, containers, parametrizations, and the initializers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from tests.architectures.case import Case, Family, NotBuildable

Make = Callable[[], nn.Module]


def _arguments() -> dict[str, tuple[Any, ...]]:
    """Return the arguments of the classes that need some, by name."""
    found: dict[str, tuple[Any, ...]] = {
        "AdaptiveLogSoftmaxWithLoss": (16, 20, [5, 10]),
        "Bilinear": (5, 6, 7),
        "CircularPad1d": (1,), "CircularPad2d": (1,), "CircularPad3d": (1,),
        "ConstantPad1d": (1, 0.5), "ConstantPad2d": (1, 0.5), "ConstantPad3d": (1, 0.5),
        "Embedding": (17, 5, 0), "EmbeddingBag": (17, 5),
        "Fold": (4, 2), "Unfold": (2,),
        "FractionalMaxPool2d": (2, 3), "FractionalMaxPool3d": (2, 3),
        "GroupNorm": (2, 6),
        "GRU": (5, 7, 2), "LSTM": (5, 7, 2), "RNN": (5, 7, 2), "RNNBase": ("LSTM", 5, 7),
        "GRUCell": (5, 7), "LSTMCell": (5, 7), "RNNCell": (5, 7), "RNNCellBase": (5, 7, True, 4),
        "LayerNorm": ((3, 5),), "RMSNorm": ((3, 5),),
        "LocalResponseNorm": (2,), "CrossMapLRN2d": (2,),
        "Linear": (5, 7), "LazyLinear": (7,), "NonDynamicallyQuantizableLinear": (5, 7),
        "LPPool1d": (2, 2), "LPPool2d": (2, 2), "LPPool3d": (2, 2),
        "MultiheadAttention": (8, 2),
        "NLLLoss2d": (), "PReLU": (6,),
        "PixelShuffle": (2,), "PixelUnshuffle": (2,), "ChannelShuffle": (2,),
        "ReflectionPad1d": (1,), "ReflectionPad2d": (1,), "ReflectionPad3d": (1,),
        "ReplicationPad1d": (1,), "ReplicationPad2d": (1,), "ReplicationPad3d": (1,),
        "Threshold": (0.1, 0.0),
        "Transformer": (8, 2, 2, 2, 12), "TransformerEncoderLayer": (8, 2, 12), "TransformerDecoderLayer": (8, 2, 12),
        "Unflatten": (1, (2, 3)),
        "UpsamplingBilinear2d": (None, 2), "UpsamplingNearest2d": (None, 2), "Upsample": (None, 2),
        "ZeroPad1d": (1,), "ZeroPad2d": (1,), "ZeroPad3d": (1,),
        "CrossEntropyLoss": (torch.tensor([0.25, 0.75]),), "BCEWithLogitsLoss": (torch.tensor([0.25, 0.75]),),
        "NLLLoss": (torch.tensor([0.25, 0.75]),), "BCELoss": (torch.tensor([0.25, 0.75]),),
        "MultiMarginLoss": (), "MultiLabelSoftMarginLoss": (torch.tensor([0.25, 0.75]),),
        "DataParallel": (nn.Linear(2, 3),), "LinearCrossEntropyLoss": (5, 7),
    }  # fmt: skip
    for dims in (1, 2, 3):
        for name in ("AvgPool", "MaxPool", "MaxUnpool", "AdaptiveAvgPool", "AdaptiveMaxPool"):
            found[f"{name}{dims}d"] = (2,)
        for name in ("Conv", "ConvTranspose"):
            found[f"{name}{dims}d"] = (4, 6, 3)
            found[f"Lazy{name}{dims}d"] = (6, 3)
        for name in ("BatchNorm", "InstanceNorm"):
            found[f"{name}{dims}d"] = (6, 1e-5, 0.1, True, True)
    found["SyncBatchNorm"] = (6,)
    return found


# Made inside the case, because their arguments are modules.
_WITH_MODULES: dict[str, Make] = {
    "TransformerEncoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 3, nn.LayerNorm(8)
    ),
    "TransformerDecoder": lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12), 3),
    "Sequential": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()),
    "ModuleList": lambda: nn.ModuleList([nn.Linear(3, 4), nn.Conv1d(3, 4, 2)]),
    "ModuleDict": lambda: nn.ModuleDict({"first": nn.Linear(3, 4), "second": nn.Embedding(3, 4)}),
    "ParameterList": lambda: nn.ParameterList([torch.randn(3), torch.rand(2, 2), nn.Parameter(torch.zeros(2))]),
    "ParameterDict": lambda: nn.ParameterDict({"first": torch.randn(3), "second": torch.ones(2)}),
    "DataParallel": lambda: nn.DataParallel(nn.Linear(2, 3)),
    "TripletMarginWithDistanceLoss": lambda: nn.TripletMarginWithDistanceLoss(distance_function=nn.PairwiseDistance()),
}  # fmt: skip


def _tied() -> nn.Module:
    model = nn.ModuleList([nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)])
    model[1].weight = model[0].weight
    return model


def _initialized(name: str) -> Make:
    """Return what makes a module with a parameter for each dtype and layout that an initializer works on."""
    arguments = {
        "constant_": (0.5,), "trunc_normal_": (0.0, 1.0, -0.5, 0.5), "sparse_": (0.5,), "uniform_": (-0.5, 0.5),
    }.get(name, ())  # fmt: skip

    def make() -> nn.Module:
        module = nn.Module()
        initializer = getattr(nn.init, name)
        shapes = [(6, 5, 3)] if name == "dirac_" else [(7, 5), (3, 21), (64, 48)]
        dtypes = (
            [torch.float32, torch.float64] if name in ("orthogonal_", "sparse_") else [torch.float32, torch.bfloat16]
        )
        for dtype in dtypes:
            for index, shape in enumerate(shapes):
                parameter = nn.Parameter(initializer(torch.empty(shape, dtype=dtype), *arguments))
                module.register_parameter(f"p{index}_{str(dtype)[6:]}", parameter)
        transposed = torch.empty(5, 6).t() if name != "dirac_" else torch.empty(5, 6, 3).transpose(0, 1)
        module.register_buffer("transposed", initializer(transposed, *arguments), persistent=False)
        return module

    return make


_INITIALIZERS = sorted(
    name
    for name, function in vars(nn.init).items()
    if name.endswith("_") and not name.startswith("_") and inspect.isfunction(function)
)

_MORE: dict[str, Make] = {
    "Conv2d, grouped and circular": lambda: nn.Conv2d(4, 8, 3, groups=2, padding_mode="circular", bias=False),
    "BatchNorm2d, without statistics": lambda: nn.BatchNorm2d(3, affine=False, track_running_stats=False),
    "LSTM, bidirectional and projected": lambda: nn.LSTM(5, 8, 2, bidirectional=True, proj_size=3),
    "GRU, without biases": lambda: nn.GRU(5, 8, bias=False, batch_first=True),
    "MultiheadAttention, of three widths": lambda: nn.MultiheadAttention(8, 2, kdim=5, vdim=6, add_bias_kv=True),
    "Embedding, limited": lambda: nn.Embedding(17, 5, padding_idx=3, max_norm=1.0, sparse=True),
    "Embedding, from values": lambda: nn.Embedding.from_pretrained(torch.rand(4, 3)),
    "Linear, of half precision": lambda: nn.Linear(5, 33, dtype=torch.bfloat16),
    "Linear, of double precision": lambda: nn.Linear(5, 7, dtype=torch.float64),
    "Linear, converted": lambda: nn.Linear(5, 7).half(),
    "Conv2d, channels last": lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
    "Linear, frozen": lambda: nn.Linear(5, 7).requires_grad_(False),
    "tied weights": _tied,
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(5, 7)),
    "weight_norm of a convolution": lambda: parametrizations.weight_norm(nn.Conv1d(5, 7, 3), dim=2),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(3, 5, 3)),
    "orthogonal by exp": lambda: parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map="matrix_exp"),
    "orthogonal by Cayley": lambda: parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map="cayley"),
    "orthogonal by Householder": lambda: parametrizations.orthogonal(nn.Linear(6, 4), orthogonal_map="householder"),
    "a removed parametrization": lambda: _without(parametrizations.weight_norm(nn.Linear(5, 7))),
    "pruned": lambda: _pruned(nn.Linear(8, 8)),
    "weights as one vector": lambda: _from_vector(nn.Linear(3, 4)),
}


def _without(module: nn.Module) -> nn.Module:
    return parametrize.remove_parametrizations(module, "weight")


def _pruned(module: nn.Module) -> nn.Module:
    from torch.nn.utils import prune

    prune.random_unstructured(module, "bias", amount=0.5)
    prune.l1_unstructured(module, "weight", amount=0.3)
    return module


def _from_vector(module: nn.Module) -> nn.Module:
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector * 2, module.parameters())
    return module


class TorchFamily(Family):
    """What torch.nn itself has."""

    def names(self) -> list[str]:
        return [
            *(f"nn.{name}" for name in classes()),
            *(f"init.{name}" for name in _INITIALIZERS),
            *_MORE,
        ]

    def case(self, name: str) -> Case:
        kind, _, rest = name.partition(".")
        if kind == "nn":
            return Case(_make(rest))
        if kind == "init":
            return Case(_initialized(rest))
        return Case(_MORE[name])


def classes() -> list[str]:
    """Return the module classes that torch.nn exports."""
    return sorted(
        name
        for name, cls in vars(nn).items()
        if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls is not nn.Module
    )


def _make(name: str) -> Make:
    if name in _WITH_MODULES:
        return _WITH_MODULES[name]
    cls, arguments = getattr(nn, name), _arguments().get(name, ())

    def make() -> nn.Module:
        module = cls(*arguments)
        if not isinstance(module, nn.Module):
            raise NotBuildable(f"{name} makes a {type(module).__name__}")
        return module

    return make
