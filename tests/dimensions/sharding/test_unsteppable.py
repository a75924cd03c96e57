"""Optimizers that cannot step shards are refused by name; tests/multi/test_optimizers.py steps all others."""

from typing import Any

import pytest
import torch
from torch import nn

from nucleate.dimensions.sharding.unsteppable import refuse_unsteppable
from nucleate.errors import ConfigurationError

pytestmark = pytest.mark.usefixtures("factories_on_device")

REFUSED = [torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Rprop, torch.optim.SparseAdam]


@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_an_optimizer_and_a_subclass_are_refused_with_a_reason_and_a_cure(cls: Any) -> None:
    class Mine(cls):
        pass

    for made, name in ((cls, cls.__name__), (Mine, "Mine")):
        with pytest.raises(ConfigurationError, match=rf"FSDP cannot step {name}: it \w+.*\. Use an .* strategy='ddp'"):
            refuse_unsteppable(made([nn.Parameter(torch.ones(2))]))


def test_an_optimizer_of_bitsandbytes_is_refused_without_importing_it() -> None:
    base = type("Optimizer8bit", (torch.optim.SGD,), {"__module__": "bitsandbytes.optim.optimizer"})
    mine = type("Mine", (base,), {})
    with pytest.raises(ConfigurationError, match=r"FSDP cannot step Mine: the kernels of bitsandbytes do not take"):
        refuse_unsteppable(mine([nn.Parameter(torch.ones(2))], lr=0.1))


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.ASGD])
def test_others_are_not_refused(cls: Any) -> None:
    refuse_unsteppable(cls([nn.Parameter(torch.ones(2))]))
