"""Train on several ranks, eagerly and deferred, and compare. Lightning or torchrun starts the ranks.

Arguments: the name of the strategy, the place where the layers are made, and a folder.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from tiny import Module, assert_same, data, make, trainer

from nucleate.deferred import deferred
from nucleate.errors import DeferredUseError
from nucleate_lightning import Materialize

STRATEGY, WHERE, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])


def fitted(context: Any, **options: Any) -> tuple[Module, Trainer]:
    model = make(WHERE, context)
    if torch.distributed.is_initialized():
        # Ranks may draw differently before; Lightning seeds them alike only where it starts the group.
        torch.manual_seed(0)
    used = trainer(strategy=STRATEGY, devices=2, callbacks=[Materialize()], max_epochs=options.pop("max_epochs", 2))
    used.fit(model, data(), **options)
    return model, used


def main() -> None:
    eager, _ = fitted(nullcontext)
    stream = torch.get_rng_state()
    ours, used = fitted(deferred)
    assert_same(ours.first, eager.first)
    assert_same(ours.state_dict(), eager.state_dict())
    assert torch.equal(torch.get_rng_state(), stream)

    used.save_checkpoint(FOLDER / "last.ckpt")
    used.strategy.barrier()
    longer, _ = fitted(deferred, max_epochs=3)
    resumed, _ = fitted(deferred, max_epochs=3, ckpt_path=FOLDER / "last.ckpt")
    assert_same(resumed.first, {**ours.state_dict()})
    assert_same(resumed.state_dict(), longer.state_dict())
    with deferred():
        again = Module.load_from_checkpoint(FOLDER / "last.ckpt", map_location="cpu", where=WHERE, context=nullcontext)
    evaluated = trainer(strategy=STRATEGY, devices=2, callbacks=[Materialize()])
    evaluated.test(again, data(), verbose=False)
    assert_same(again.first, ours.state_dict())

    with pytest.raises(DeferredUseError, match=r"Distributed.* cannot work .*nucleate_lightning.Materialize\(\)"):
        trainer(strategy=STRATEGY, devices=2).fit(make(WHERE, deferred), data())
    print(f"rank {used.global_rank}: kept", flush=True)


if __name__ == "__main__":
    main()
