"""Copies of a model that is deferred: exact, tied and shared as eager copies are, and independent."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from nucleate.deferred import deferred, handle_of
from nucleate.errors import DeferredUseError
from nucleate.materialize import materialize
from tests.deferred.equality import assert_same_model


class Net(nn.Module):
    """Ties, views of one storage, an expanded and a strided buffer, an attribute, an LSTM and a real tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(40, 40)
        self.tied = nn.Linear(40, 40)
        self.tied.weight = self.first.weight
        self.viewed = nn.Parameter(self.first.bias.data[:7])
        self.lstm = nn.LSTM(4, 4)
        table = torch.randn(6, 8)
        self.register_buffer("table", table)
        self.register_buffer("rows", table[1:3])
        self.register_buffer("column", table.t()[2], persistent=False)
        self.register_buffer("wide", torch.randn(1, 3).expand(5, 3))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.plain = [torch.randn(3)]
        self.frozen = nn.Parameter(torch.randn(3, 3).t(), requires_grad=False)
        self.first.weight.tag = "mine"


def both(then: Callable[[nn.Module], nn.Module], make: Callable[[], nn.Module] = Net) -> None:
    """Assert that what `then` returns is the same on an eager model and on a deferred one, and the model as well."""
    torch.manual_seed(0)
    eager = make()
    expected = then(eager)
    stream = torch.rand(3)
    torch.manual_seed(0)
    with deferred():
        model = make()
    actual = then(model)
    assert torch.equal(stream, torch.rand(3))
    materialize(actual)
    assert_same_model(expected, actual)
    materialize(model)
    assert_same_model(eager, model)
    assert_same_model(nn.ModuleList([eager, expected]), nn.ModuleList([model, actual]))


def test_a_deep_copy_is_exact_and_independent() -> None:
    both(copy.deepcopy)


def test_a_deep_copy_of_a_copy_is_exact() -> None:
    both(lambda model: copy.deepcopy(copy.deepcopy(model)))


def test_a_deep_copy_of_part_of_a_model_is_exact() -> None:
    both(lambda model: copy.deepcopy(model.lstm))


def test_a_deep_copy_made_inside_keeps_shared_storages() -> None:
    def make() -> nn.Module:
        model = nn.ModuleList([Net()])
        model.append(copy.deepcopy(model[0]))
        return model

    both(lambda model: model, make)


def test_plain_attributes_are_copied() -> None:
    with deferred():
        model = Net()
    twin = copy.deepcopy(model)
    materialize(nn.ModuleList([model, twin]))
    assert torch.equal(twin.plain[0], model.plain[0])
    assert twin.plain[0].data_ptr() != model.plain[0].data_ptr()


def test_a_copy_is_deferred_too_and_can_be_made_first_or_alone() -> None:
    with deferred():
        model = Net()
    twin = copy.deepcopy(model)
    handle = handle_of(twin.first.weight)
    assert handle is not None
    assert handle.fqn == "first.weight"
    assert type(materialize(twin).first.weight) is nn.Parameter
    assert twin.first.weight.abs().sum() > 0
    assert handle_of(model.first.weight) is not None
    with pytest.raises(DeferredUseError, match=r"first\.weight"):
        model.first(torch.ones(40))


def test_casting_or_tying_one_of_two_copies_leaves_the_other() -> None:
    def then(model: nn.Module) -> nn.Module:
        twin = copy.deepcopy(model)
        twin.to(torch.bfloat16)
        twin.tied = twin.first
        model.lstm.weight_hh_l0 = model.lstm.weight_ih_l0
        return twin

    both(then)


def test_a_parameter_alone_and_a_tensor_alone_can_be_copied() -> None:
    def then(model: nn.Module) -> nn.Module:
        parameter = copy.deepcopy(model.frozen)
        holder = nn.Module()
        holder.w = parameter
        holder.same = nn.Parameter(copy.deepcopy(model.first.weight.data))
        holder.register_buffer("rows", copy.deepcopy(model.rows))
        return holder

    both(then)


def test_a_shallow_copy_shares_what_an_eager_one_shares() -> None:
    def then(model: nn.Module) -> nn.Module:
        holder = nn.ModuleList([model, copy.copy(model)])
        holder.alias = copy.copy(model.first.weight)
        holder.register_buffer("rows", copy.copy(model.rows))
        assert holder.alias.tag == "mine"
        return holder

    both(then)


SURGERY: dict[str, Callable[[nn.Module], nn.Parameter]] = {
    "transposed": lambda m: nn.Parameter(m.first.weight.data.t()),
    "cloned": lambda m: nn.Parameter(m.first.weight.detach().clone()),
    "detached": lambda m: nn.Parameter(m.first.weight.detach()),
    "of the parameter": lambda m: nn.Parameter(m.first.weight, requires_grad=False),
    "of a part": lambda m: nn.Parameter(m.first.weight.data[3:9, 2:].contiguous()),
    "reshaped": lambda m: nn.Parameter(m.first.weight.data.t().reshape(-1)),
    "cast": lambda m: nn.Parameter(m.first.weight.data.to(torch.float64)),
    "of a buffer": lambda m: nn.Parameter(m.rows),
    "of nothing new": lambda m: nn.Parameter(m.frozen.data, requires_grad=m.frozen.requires_grad),
}


@pytest.mark.parametrize("surgery", SURGERY.values(), ids=SURGERY.keys())
def test_a_parameter_made_from_a_deferred_tensor_is_exact(surgery: Callable[[nn.Module], nn.Parameter]) -> None:
    def then(model: nn.Module) -> nn.Module:
        parameter = surgery(model)
        assert isinstance(parameter, nn.Parameter)
        model.new = parameter
        assert "new" in dict(model.named_parameters())
        return model

    both(then)


def test_a_buffer_made_from_a_deferred_tensor_is_exact() -> None:
    def then(model: nn.Module) -> nn.Module:
        model.extra = nn.Buffer(model.first.weight.detach()[0])
        return model

    both(then)


def test_an_averaged_model_can_be_made_before_setup() -> None:
    both(torch.optim.swa_utils.AveragedModel)


def test_weights_go_from_one_deferred_model_into_another() -> None:
    def make() -> nn.Module:
        return nn.ModuleList([nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 30)])

    torch.manual_seed(0)
    first, second = make(), make()
    torch.manual_seed(0)
    with deferred():
        one = make()
    with deferred():
        two = make()
    for a, b in ((first, second), (one, two)):
        b[0].weight = a[0].weight
        b[1].weight.data = a[1].weight.data
        b[2].load_state_dict(copy.deepcopy(a[2].state_dict()), assign=True)
    materialize(two)
    materialize(one)
    assert_same_model(nn.ModuleList([first, second]), nn.ModuleList([one, two]))


def test_a_lazy_module_can_be_copied() -> None:
    with deferred():
        model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3))
    twin = copy.deepcopy(model)
    materialize(twin)
    assert twin(torch.ones(2, 5)).shape == (2, 3)


def test_like_tensors_made_outside_are_real() -> None:
    with deferred():
        model = Net()
    made = (torch.zeros_like(model.first.weight), torch.ones_like(model.frozen), torch.randn_like(model.table))
    made += (model.table.new_zeros(3), model.table.new_tensor([1.0]), torch.full_like(model.table, 2))
    for tensor in made:
        assert tensor.device == torch.device("cpu")
        assert type(tensor) is torch.Tensor
        assert tensor.isfinite().all()
    assert made[1].stride() == (1, 3)


def spawn(model: nn.Module) -> None:
    multiprocessing.get_context("spawn").Process(target=print, args=(model,)).start()


SAVES: dict[str, Callable[[nn.Module], object]] = {
    "pickle": pickle.dumps,
    "save": lambda m: torch.save(m, io.BytesIO()),
    "save state_dict": lambda m: torch.save(m.state_dict(), io.BytesIO()),
    "save parameter": lambda m: torch.save(m.frozen, io.BytesIO()),
    "spawn": spawn,
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES.keys())
def test_pickling_is_refused_by_name_with_what_to_do(save: Callable[[nn.Module], object]) -> None:
    with deferred():
        model = Net()
    with pytest.raises(DeferredUseError, match=r"(viewed|frozen|first\.weight) is deferred.*pickling.*setup\(model\)"):
        save(model)
    save(materialize(model)) if save is not spawn else None
