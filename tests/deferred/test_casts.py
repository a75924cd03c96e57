"""A deferred model can be moved to dtypes and layouts: bit for bit as eager construction and the same call."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from nucleate.deferred import deferred
from nucleate.errors import DeferredUseError
from nucleate.materialize import materialize
from tests.deferred.equality import assert_same_model, named_tensors
from tests.deferred.test_copies import Net, both


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.head = Net()
        self.again = self.head.first


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "float": lambda m: m.float(),
    "bfloat16": lambda m: m.bfloat16(),
    "there and back": lambda m: m.half().float(),
    "to the device": lambda m: m.to("cpu"),
    "cpu": lambda m: m.cpu(),
    "to device and dtype": lambda m: m.to(torch.device("cpu"), torch.float16),
    "to another tensor's": lambda m: m.to(torch.ones(1, dtype=torch.float64)),
    "type": lambda m: m.type(torch.float16),
    "type by name": lambda m: m.type("torch.DoubleTensor"),
    "type by class": lambda m: m.type(torch.BFloat16Tensor),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "channels_last in half": lambda m: m.to("cpu", torch.half, memory_format=torch.channels_last),
    "part": lambda m: (m.head.lstm.half(), m)[1],
    "in inference mode": torch.inference_mode()(lambda m: m.half()),
    "under autocast": torch.autocast("cpu")(lambda m: m.half()),
    "one parameter": lambda m: (setattr(m.conv.weight, "data", m.conv.weight.data.double()), m)[1],
    "one parameter's layout": lambda m: (
        setattr(m.conv.weight, "data", m.conv.weight.data.to(memory_format=torch.channels_last)),
        m,
    )[1],
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_a_cast_before_setup_is_exact(cast: Callable[[nn.Module], nn.Module]) -> None:
    both(cast, Images)


@pytest.fixture(params=["overwrite", "swap"])
def conversion(request: pytest.FixtureRequest) -> Iterator[None]:
    future = torch.__future__
    setter = {
        "overwrite": future.set_overwrite_module_params_on_conversion,
        "swap": future.set_swap_module_params_on_conversion,
    }[request.param]
    setter(True)
    yield
    setter(False)


@pytest.mark.usefixtures("conversion")
def test_a_cast_is_exact_in_torchs_other_ways_of_converting() -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(4, 4), nn.Linear(4, 4))
        model[3].weight = model[2].weight
        return model

    both(lambda model: model.to(torch.bfloat16), make)


def test_a_cast_keeps_the_parameter_objects_and_says_so() -> None:
    with deferred():
        model = Images()
    before = dict(model.named_parameters(remove_duplicate=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.to(torch.bfloat16)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {parameter.dtype for parameter in after.values()} == {torch.bfloat16}
    assert "dtype=torch.bfloat16" in repr(model.conv.weight)
    materialize(model)
    assert optimizer.param_groups[0]["params"][0] is model.conv.weight


def test_a_move_to_another_device_is_refused_with_what_to_do() -> None:
    with deferred():
        model = nn.Sequential(nn.Linear(2, 2))
    for device in ("cuda", "cuda:0", "meta", torch.device("meta")):
        with pytest.raises(DeferredUseError, match=r"0\.weight is deferred .* cannot be moved .*materialize\("):
            model.to(device)
    with pytest.raises(DeferredUseError, match=r"cannot be moved to cuda"):
        model.cuda()
    assert all(not tensor.is_meta for tensor in named_tensors(model).values())


def test_a_cast_inside_a_second_context_is_exact() -> None:
    torch.manual_seed(0)
    eager = Images().half()
    torch.manual_seed(0)
    with deferred():
        model = Images()
    with deferred():
        model.half()
    materialize(model)
    assert_same_model(eager, model)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_module_may_be_moved_to_a_tensors_dtype_inside_a_context(by_name: bool) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, dtype=torch.float64))
        return model.to(tensor=model[1].weight) if by_name else model.to(model[1].weight, non_blocking=True)

    both(lambda model: model, make)


@pytest.mark.usefixtures("conversion")
def test_a_cast_inside_is_exact_in_torchs_other_ways_of_converting() -> None:
    both(lambda model: model, lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).half())
