"""On 2 ranks of which rank 1 computes otherwise: what would make other bits is refused by name, the rest goes through.

Arguments: a variable of the environment (or `torch` for its version) and its value on rank 1, then `strategy:model`
pairs to try and, behind `=`, a part of the message that refuses them; without one they must come out as eager
construction makes them.
"""

import os
import sys

variable, value, *cases = sys.argv[1:]
if os.environ["RANK"] == "1" and variable != "torch":
    os.environ[variable] = value

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from nucleate import Runtime  # noqa: E402
from nucleate.errors import RankDisagreementError  # noqa: E402

if os.environ["RANK"] == "1" and variable == "torch":
    torch.__version__ = type(torch.__version__)(value)


class Table(nn.Module):
    """Rotary frequencies, which every capability computes alike at this size, and weights between 0 and 1."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(32, 32))
        self.register_buffer("inv_freq", 1 / 10_000 ** (torch.arange(0, 64, 2) / 64))


def normal() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Embedding(40, 8))


def constants() -> nn.Module:
    return nn.BatchNorm1d(8)


def orthogonal() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(100, 100))
    nn.init.orthogonal_(model[1].weight)
    return model


def linear() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(300), nn.Linear(300, 300))


def uniform() -> nn.Module:
    # Between 0 and 1, or over a range that is a power of two, `uniform_` rounds once in every build of its kernel.
    model = nn.Sequential(nn.LayerNorm(300), nn.Linear(300, 300), nn.LSTM(9, 7))
    for parameter in model[1:].parameters():
        nn.init.uniform_(parameter, -0.25, 0.25)
    model.scale = nn.Parameter(torch.rand(5000) * 0.3 - 0.1)
    return model


def table_of_powers() -> nn.Module:
    model = nn.Linear(8, 8)
    # Large enough to be split over threads, and of a length that leaves a rest at the end of each part.
    model.register_buffer("powers", torch.linspace(0.1, 1.1, 40_003) ** 2.3)
    return model


MODELS = {
    "normal": normal,
    "linear": linear,
    "constants": constants,
    "orthogonal": orthogonal,
    "uniform": uniform,
    "table": Table,
    "powers": table_of_powers,
}

for case in cases:
    where, _, message = case.partition("=")
    strategy, _, name = where.partition(":")
    runtime = Runtime(accelerator="cpu", strategy=strategy)
    torch.manual_seed(0)
    eager = MODELS[name]()
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        model = MODELS[name]()
    if message:
        with pytest.raises(RankDisagreementError, match=message):
            runtime.setup(model)
        # Nothing has been made.
        assert all("deferred" in repr(parameter) for parameter in model.parameters())
        continue
    runtime.setup(model)
    expected = {**dict(eager.named_parameters()), **dict(eager.named_buffers())}
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        assert torch.equal(whole, expected[key]), key
print("as it should be", flush=True)
