"""Dimensions with one fault each, under the suite; scripts/dimension_faults.py runs the test that must find it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nucleate.dimensions import Dimension, Placements, TensorParallel
from nucleate.layout import Mesh, Shard
from nucleate.testing import DimensionSuite, TinyGPT
from tests.device import accelerator, device


class Works(TensorParallel):
    def __init__(self) -> None:
        super().__init__(TinyGPT.plan)
        torch.rand(1)


class Broadcasts(TensorParallel):
    def apply(self, model: nn.Module, mesh: Any) -> None:
        super().apply(model, mesh)
        dist.broadcast(torch.zeros(1, device=device()), src=0)


class MakesValues(TensorParallel):
    def apply(self, model: nn.Module, mesh: Any) -> None:
        super().apply(model, mesh)
        model.norm.weight = nn.Parameter(torch.ones(TinyGPT.width, device=device()))  # type: ignore[union-attr]


class Draws(TensorParallel):
    def apply(self, model: nn.Module, mesh: Any) -> None:
        super().apply(model, mesh)
        torch.rand(1, device="cpu")


class SaysOther(TensorParallel):
    def placements(self, model: nn.Module, mesh: Mesh) -> Placements | None:
        return {**(super().placements(model, mesh) or {}), "blocks.0.up.weight": {"tp": Shard(1)}}


class SaysTensors(TensorParallel):
    def placements(self, model: nn.Module, mesh: Mesh) -> Placements | None:
        torch.empty(3).sum()
        return super().placements(model, mesh)


class SplitsNothing(TensorParallel):
    def placements(self, model: nn.Module, mesh: Mesh) -> Placements | None:
        return {}

    def apply(self, model: nn.Module, mesh: Any) -> None: ...


class Thaws(TensorParallel):
    def apply(self, model: nn.Module, mesh: Any) -> None:
        super().apply(model, mesh)
        model.requires_grad_(True)


class ForgetsDropout(TensorParallel):
    def enclose(self, model: nn.Module) -> nn.Module:
        return model


class Suite(DimensionSuite):
    accelerator = accelerator()
    kind: type[TensorParallel]

    def make_dimension(self) -> Dimension:
        return self.kind() if self.kind is Works else self.kind(TinyGPT.plan)


class TestWorks(Suite):
    kind = Works


class TestBroadcasts(Suite):
    kind = Broadcasts


class TestMakesValues(Suite):
    kind = MakesValues


class TestDraws(Suite):
    kind = Draws


class TestSaysOther(Suite):
    kind = SaysOther


class TestSaysTensors(Suite):
    kind = SaysTensors


class TestSplitsNothing(Suite):
    kind = SplitsNothing


class TestThaws(Suite):
    kind = Thaws


class TestForgetsDropout(Suite):
    kind = ForgetsDropout


class TestTakesFusedForPlain(Suite):
    """The weights are exact, and each rank computes with a part of the query and of the key, as if it was whole."""

    def make_dimension(self) -> Dimension:
        return TensorParallel({**TinyGPT.plan, "blocks.*.qkv": "colwise"})
