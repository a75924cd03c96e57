"""Train under `ModelParallelStrategy` on 2 ranks: each makes its shards of a model that `configure_model` shards.

Argument: a folder.
"""

from __future__ import annotations

import resource
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from tiny import Module, assert_same, data, trainer
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nucleate.deferred import deferred
from nucleate.errors import (
    DeferredEditError,
    DeferredUseError,
    RankDisagreementError,
    UninitializedError,
)
from nucleate_lightning import Materialize, sharding

FOLDER = Path(sys.argv[1])


class Sharded(Module):
    """A module whose `configure_model` shards its layers, and makes them if nobody has."""

    way = "sharding"

    def configure_model(self) -> None:
        self._make()
        if self.way == "eager" or self.way == "unmarked":
            self._shard()
        elif self.way == "inside":
            with deferred():
                self._shard()
        else:
            with sharding(self):
                self._shard()
                if self.way == "edit":
                    torch.nn.init.zeros_(self.net[1].bias)

    def _shard(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[0], mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def remember(self) -> None:
        if not self.first:
            self.first = gathered(self)


def gathered(model: torch.nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {k: t.full_tensor().clone() if isinstance(t, DTensor) else t.clone() for k, t in state.items()}


def fitted(where: str, way: str, seed: int = 0, **options: Any) -> tuple[Sharded, Trainer]:
    torch.manual_seed(seed)
    context = nullcontext if way == "eager" else deferred
    model = Sharded.__new__(Sharded)
    with context():
        Sharded.__init__(model, where, context)
    model.way = way
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    used = trainer(strategy=strategy, devices=2, callbacks=[Materialize()], max_epochs=options.pop("max_epochs", 2))
    used.fit(model, data(), **options)
    return model, used


def the_peak_is_this_rank_s_part() -> None:
    mib = 2**20
    with deferred():
        layers = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(16)))  # 256 MiB
    mesh = init_device_mesh("cpu", (2,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with sharding(layers):
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert added < (128 + 48) * mib, added / mib


def main() -> None:
    for where in ("init", "configure_model"):
        eager, _ = fitted(where, "eager")
        stream = torch.get_rng_state()
        ours, used = fitted(where, "sharding")
        assert ours.net[0].weight.to_local().shape == (8, 8)
        assert ours.net[4].weight is ours.net[3].weight
        assert_same(ours.first, eager.first)
        assert_same(gathered(ours), gathered(eager))
        assert torch.equal(torch.get_rng_state(), stream)

        used.save_checkpoint(FOLDER / where)
        longer, _ = fitted(where, "sharding", max_epochs=3)
        resumed, _ = fitted(where, "sharding", max_epochs=3, ckpt_path=FOLDER / where)
        assert_same(resumed.first, gathered(ours))
        assert_same(gathered(resumed), gathered(longer))

    the_peak_is_this_rank_s_part()
    rank = torch.distributed.get_rank()
    with pytest.raises(DeferredUseError, match="net.0.weight is deferred"):
        fitted("init", "unmarked")
    with pytest.raises(DeferredEditError, match="net.1.bias were edited inside `sharding`"):
        fitted("init", "edit")
    with pytest.raises(UninitializedError, match=r"inside `with nucleate_lightning.sharding\(model\):`"):
        fitted("init", "inside")
    with pytest.raises(RankDisagreementError, match="ranks 1 recorded another construction"):
        fitted("init", "sharding", seed=rank)
    print(f"rank {rank}: kept", flush=True)


if __name__ == "__main__":
    main()
