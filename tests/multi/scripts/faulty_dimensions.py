"""Dimensions with one fault each, and the test of the suite that must fail for it, with its message."""

from __future__ import annotations

from typing import Any

import pytest
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


FAULTS = {
    "TestWorks::test_its_constructor_does_no_work": "the constructor computes",
    "TestBroadcasts::test_apply_exchanges_nothing_and_makes_no_values": "`apply` exchanges values",
    "TestMakesValues::test_apply_exchanges_nothing_and_makes_no_values": "`apply` makes the values of",
    "TestDraws::test_apply_exchanges_nothing_and_makes_no_values": "`apply` draws random numbers",
    "TestSaysOther::test_the_layout_is_the_one_that_placements_said": "blocks.0.up.weight on rank 0",
    "TestSaysTensors::test_placements_are_plain_data_for_a_thousand_ranks": "compute with tensors",
    "TestSplitsNothing::test_each_rank_holds_the_parts_that_its_layout_says": "no tensor is split",
    "TestThaws::test_gradients_and_trained_weights_are_those_of_a_plain_loop": "blocks.0.up",
    "TestForgetsDropout::test_ranks_with_the_same_data_drop_the_same_values": "not close",
    "TestTakesFusedForPlain::test_losses_follow_those_of_a_plain_loop": "not close",
}


class Messages:
    """The messages of tests that failed."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.texts.append(report.longreprtext)


if __name__ == "__main__":
    for test, message in FAULTS.items():
        seen = Messages()
        status = pytest.main(["-x", "-q", f"{__file__}::{test}"], plugins=[seen])
        assert status == pytest.ExitCode.TESTS_FAILED, f"{test} ended with {status!r}"
        assert message in seen.texts[0], f"{test}: {seen.texts[0]}"
        print(f"{test} is a fault", flush=True)
