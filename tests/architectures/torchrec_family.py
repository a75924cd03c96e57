"""torchrec's embedding collections and recommender models, with small tables and a batch of three for each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.architectures.case import Case, Family

DENSE_FEATURES, WIDTH = 10, 8
_KEYS = ["f1", "f2", "f3", "f4"]


class TorchrecFamily(Family):
    """EmbeddingBagCollection, EmbeddingCollection, DLRM, DeepFM, and what these are made of."""

    def names(self) -> list[str]:
        return [*_CASES, *ON_META]

    def case(self, name: str) -> Case:
        import torchrec

        if name in ON_META:
            return Case(lambda: ON_META[name](torchrec), by_hand=_reset_by_hand, forward=forward)
        return Case(lambda: _CASES[name](torchrec), forward=forward if name in _WITH_FORWARD else None)


def _tables(torchrec: Any, cls: str = "EmbeddingBagConfig", half: bool = True) -> list[Any]:
    """Return the configurations of three tables, each with another size, pooling, dtype and initializer."""
    from torchrec.modules.embedding_configs import DataType

    means = {"pooling": torchrec.PoolingType.MEAN} if cls == "EmbeddingBagConfig" else {}
    table = partial(getattr(torchrec, cls), embedding_dim=WIDTH)
    return [
        # By default uniform, in bounds that follow from the number of rows.
        table(name="t1", num_embeddings=11, feature_names=["f1"]),
        table(name="t2", num_embeddings=13, feature_names=["f2", "f3"], init_fn=_normal, **means),
        table(
            name="t3", num_embeddings=17, feature_names=["f4"], weight_init_min=-0.5, weight_init_max=0.25,
            data_type=DataType.FP16 if half else DataType.FP32,
        ),
    ]  # fmt: skip


def _normal(weight: Tensor) -> Tensor:
    return nn.init.normal_(weight, std=0.02)


def _bags(torchrec: Any, **arguments: Any) -> nn.Module:
    bags: nn.Module = torchrec.EmbeddingBagCollection(_tables(torchrec), **arguments)
    return bags


def _weighted(torchrec: Any) -> nn.Module:
    # Weights of samples are for sums only.
    tables = [torchrec.EmbeddingBagConfig(16, WIDTH, name, feature_names=[name]) for name in _KEYS]
    bags: nn.Module = torchrec.EmbeddingBagCollection(tables, is_weighted=True)
    return bags


def _embeddings(torchrec: Any, **arguments: Any) -> nn.Module:
    embeddings: nn.Module = torchrec.EmbeddingCollection(_tables(torchrec, "EmbeddingConfig"), **arguments)
    return embeddings


def _dlrm(torchrec: Any, cls: str = "DLRM", device: str | None = None, **arguments: Any) -> nn.Module:
    from torchrec.models import dlrm

    where = None if device is None else torch.device(device)
    bags = _bags(torchrec, device=where)
    model: nn.Module = getattr(dlrm, cls)(bags, DENSE_FEATURES, [16, WIDTH], [5, 1], dense_device=where, **arguments)
    return model


def _simple_deep_fm(torchrec: Any) -> nn.Module:
    from torchrec.models.deepfm import SimpleDeepFMNN

    model: nn.Module = SimpleDeepFMNN(DENSE_FEATURES, _bags(torchrec), hidden_layer_size=20, deep_fm_dimension=5)
    return model


def _of(module: str, make: Callable[[Any], nn.Module]) -> Callable[[Any], nn.Module]:
    """Return what makes a part of torchrec, given its module."""

    def made(torchrec: Any) -> nn.Module:
        from importlib import import_module

        return make(import_module(f"torchrec.{module}"))

    return made


_MODELS: dict[str, Callable[[Any], nn.Module]] = {
    "EmbeddingBagCollection": _bags,
    "EmbeddingBagCollection on the CPU by name": partial(_bags, device=torch.device("cpu")),
    "EmbeddingBagCollection, weighted": _weighted,
    "EmbeddingCollection": _embeddings,
    "EmbeddingCollection on the CPU by name": partial(_embeddings, device=torch.device("cpu"), need_indices=True),
    "DLRM": _dlrm,
    "DLRM on the CPU by name": partial(_dlrm, device="cpu"),
    "DLRM_DCN": partial(_dlrm, cls="DLRM_DCN", dcn_num_layers=2, dcn_low_rank_dim=4),
    "DLRM_Projection": partial(
        _dlrm, cls="DLRM_Projection", interaction_branch1_layer_sizes=[16, 16],
        interaction_branch2_layer_sizes=[16, 16],
    ),
    "SimpleDeepFMNN": _simple_deep_fm,
}  # fmt: skip

_PARTS: dict[str, Callable[[Any], nn.Module]] = {
    "DLRMTrain": lambda torchrec: _of("models.dlrm", lambda dlrm: dlrm.DLRMTrain(_dlrm(torchrec)))(torchrec),
    "DeepFM": _of("modules.deepfm", lambda deepfm: deepfm.DeepFM(nn.Sequential(nn.Linear(192, 5), nn.ReLU()))),
    "FactorizationMachine": _of("modules.deepfm", lambda deepfm: deepfm.FactorizationMachine()),
    "FMInteractionArch": _of("models.deepfm", lambda deepfm: deepfm.FMInteractionArch(40, _KEYS, 5)),
    "MLP": _of("modules.mlp", lambda mlp: mlp.MLP(10, [16, 8], activation=torch.sigmoid)),
    "MLP with SwishLayerNorm": _of("modules.mlp", lambda mlp: mlp.MLP(10, [16, 8], activation="swish_layernorm")),
    "CrossNet": _of("modules.crossnet", lambda crossnet: crossnet.CrossNet(8, 2)),
    "LowRankCrossNet": _of("modules.crossnet", lambda crossnet: crossnet.LowRankCrossNet(8, 2, 3)),
    "VectorCrossNet": _of("modules.crossnet", lambda crossnet: crossnet.VectorCrossNet(8, 2)),
    "LowRankMixtureCrossNet": _of("modules.crossnet", lambda crossnet: crossnet.LowRankMixtureCrossNet(8, 2, 3, 2)),
    "PositionWeightedModule": _of(
        "modules.feature_processor_", lambda processors: processors.PositionWeightedModule(max_feature_length=7)
    ),
    "PositionWeightedModuleCollection": _of(
        "modules.feature_processor_",
        lambda processors: processors.PositionWeightedModuleCollection(dict.fromkeys(_KEYS, 7)),
    ),
}

_CASES = {**_MODELS, **_PARTS}

#: Those that take a batch of sparse features, or of dense and sparse ones.
_WITH_FORWARD = frozenset(_MODELS)

#: Tables without values, as those have them who let torchrec shard them; `setup` has to make the values.
ON_META: dict[str, Callable[[Any], nn.Module]] = {
    "EmbeddingBagCollection built on meta": lambda torchrec: torchrec.EmbeddingBagCollection(
        _tables(torchrec, half=False), device=torch.device("meta")
    ),
    "EmbeddingCollection built on meta": lambda torchrec: torchrec.EmbeddingCollection(
        _tables(torchrec, "EmbeddingConfig", half=False), device=torch.device("meta")
    ),
}


def _reset_by_hand(model: nn.Module) -> None:
    """Do what users do without us: allocate, then call `reset_parameters()` of each module, children first.

    A collection's own `reset_parameters()` returns at once, for it remembers the meta device. So the tables have the
    values that `nn.EmbeddingBag` and `nn.Embedding` give them.
    """
    model.to_empty(device="cpu")
    model.apply(_reset)


def _reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def forward(model: nn.Module, kind: nn.Module | None = None) -> Tensor:
    """Run a batch of three, with bags of different lengths, some of them empty.

    Args:
        model: One of those in `_WITH_FORWARD`, or what a strategy has made of it.
        kind: The model itself, where `model` wraps it.
    """
    import torchrec

    kind = model if kind is None else kind
    values = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1])
    lengths = torch.tensor([2, 0, 1, 1, 1, 3, 0, 0, 1, 1, 1, 0])
    weights = values / 7 if getattr(kind, "is_weighted", bool)() else None
    sparse = torchrec.KeyedJaggedTensor(_KEYS, values, weights, lengths)
    if isinstance(kind, torchrec.EmbeddingBagCollection):
        pooled: Tensor = model(sparse).values()
        return pooled
    if isinstance(kind, torchrec.EmbeddingCollection):
        return torch.cat([found.values() for found in model(sparse).values()])
    logits: Tensor = model(torch.linspace(-1, 1, 3 * DENSE_FEATURES).view(3, -1), sparse)
    return logits
