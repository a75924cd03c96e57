"""Train in processes that Lightning forks or spawns, eagerly and deferred. Arguments: the strategy and the place."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch
from tiny import Module, assert_same, data, make, trainer

from nucleate.deferred import deferred
from nucleate.errors import DeferredUseError
from nucleate.materialize import materialize
from nucleate_lightning import Materialize

STRATEGY, WHERE = sys.argv[1:]


class Kept(Module):
    """Compares its first values with those of the eager constructor, in the process that trains."""

    def on_train_end(self) -> None:
        torch.manual_seed(0)
        assert_same(self.first, {f"net.{name}": tensor for name, tensor in type(self.net)().state_dict().items()})
        print(f"rank {self.trainer.global_rank}: kept", flush=True)


def main() -> None:
    results = []
    for context in (nullcontext, deferred):
        torch.manual_seed(0)
        with context():
            model = Kept(WHERE, context)
        trainer(strategy=STRATEGY, devices=2, callbacks=[Materialize()]).fit(model, data())
        materialize(model)
        results.append(model.state_dict())
    if WHERE == "init":
        assert_same(results[1], results[0])
    elif STRATEGY == "ddp_spawn":
        with pytest.raises(DeferredUseError, match="pickling"):
            trainer(strategy=STRATEGY, devices=2, callbacks=[Materialize()]).fit(make("init", deferred), data())
    print("after: kept", flush=True)


if __name__ == "__main__":
    main()
