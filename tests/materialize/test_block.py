"""Blocks of construction that end with real tensors: whatever a script does afterwards works as after eager torch."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nucleate.deferred import deferred, eager, handle_of, is_recording, record_of
from nucleate.errors import DeferredUseError
from nucleate.materialize import block, materialize
from nucleate.materialize.block import Block
from nucleate.testing import peak_memory
from tests.deferred.equality import differences, seed_everything, streams
from tests.deferred.idioms.idiom import Body, Constructed
from tests.deferred.idioms.test_kinds_of_tensors import idiom as kinds_of_tensors
from tests.deferred.idioms.test_modules import idiom as modules

CPU = torch.device("cpu")
MIB = 2**20
X = torch.ones(1, 8)


@contextmanager
def constructing() -> Iterator[None]:
    """Surround what `init_module()` would."""
    one = Block(CPU)
    with one.construction():
        yield
    one.make()


@pytest.fixture(autouse=True)
def all_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "ONSET_NUMEL", 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(x)))
        return y


def trained_by_hand(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.1)
    model(X).sum().backward()
    optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def initialized_afterwards(model: Net) -> Tensor:
    nn.init.normal_(model.a.weight)
    model.b.weight.data.mul_(2)
    with torch.no_grad():
        model.b.bias.copy_(torch.ones(8))
    return model(X).detach()


def averaged(model: Net) -> Tensor:
    average = copy.deepcopy(model)
    for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
        ours.data.lerp_(theirs.data, 0.5)
    return average(X).detach()


def with_gradients_set(model: Net) -> Tensor:
    model.a.weight.grad = torch.ones(8, 8)
    (model.a.weight**2).sum().backward()
    return model.a.weight.grad


USES: dict[str, Callable[[Net], Any]] = {
    "called": lambda model: model(X).detach(),
    "trained": trained_by_hand,
    "initialized": initialized_afterwards,
    "averaged": averaged,
    "pickled": lambda model: pickle.loads(pickle.dumps(model))(X).detach(),
    "read": lambda model: torch.tensor([p.norm().item() for p in model.parameters()]),
    "numpy": lambda model: torch.from_numpy(model.a.weight.detach().numpy().copy()),
    "shared": lambda model: model.share_memory().a.weight.detach(),
    "normed": lambda model: nn.utils.parametrizations.weight_norm(model.a)(X).detach(),
    "gradients": with_gradients_set,
    "class": lambda model: torch.tensor(type(model.a.weight) is nn.Parameter),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_after_the_block_a_model_can_be_used_without_setup(use: Callable[[Net], Any]) -> None:
    torch.manual_seed(1)
    expected = use(Net())
    torch.manual_seed(1)
    with constructing():
        model = Net()
        assert record_of(model.a.weight) is not None
    assert handle_of(model.a.weight) is None
    assert torch.equal(use(model), expected)


SCRIPTING = "ignore:`torch.jit:DeprecationWarning"
CONSTRUCTORS = {**modules, **kinds_of_tensors}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*:UserWarning", SCRIPTING)
@pytest.mark.parametrize("numel", [1, 6, 20])
@pytest.mark.parametrize("body", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_constructors_are_exact_wherever_the_recording_begins(
    body: Body, numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "ONSET_NUMEL", numel)
    seed_everything(0)
    expected = Constructed(body)
    after = streams()
    seed_everything(0)
    with constructing():
        model = Constructed(body)
    assert streams() == after
    assert list(differences(expected, model)) == []


def test_small_constructors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with constructing():
        model = Net()
        assert not is_recording()
        assert model(X).isfinite().all()
        large = nn.Linear(1024, block.ONSET_NUMEL // 1024)
        assert is_recording()
    assert handle_of(large.weight) is None


def test_what_no_module_holds_is_made_too() -> None:
    with constructing():
        nn.Linear(2, 2)
        alone = torch.full((3,), 2.0)
        listed = [torch.ones(4), {"view": alone[1:]}]
        parameter = nn.Parameter(torch.zeros(2))
    alone += 1
    assert listed[1]["view"].tolist() == [3, 3]
    assert listed[0].sum() == 4
    assert type(parameter) is nn.Parameter
    assert parameter.requires_grad
    assert parameter.tolist() == [0, 0]


def test_a_parameter_and_a_view_on_it_stay_the_same_objects() -> None:
    with constructing():
        model = Net()
        model.b.weight = model.a.weight
        weight, row = model.a.weight, model.a.weight.detach()[2]
    assert model.a.weight is weight is model.b.weight
    row.fill_(7)
    assert (weight[2] == 7).all()


def test_an_optimizer_of_the_block_trains_the_model() -> None:
    torch.manual_seed(1)
    expected = trained_by_hand(Net())
    torch.manual_seed(1)
    with constructing():
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    assert torch.equal(trained_by_hand(model, optimizer), expected)


def test_gradients_of_the_block_are_kept() -> None:
    with constructing():
        model = Net()
        loss = model(X).sum()
        loss.backward()
    assert torch.equal(model.b.bias.grad, torch.ones(8))
    assert loss.item() == model(X).sum().item()


def test_what_the_constructor_leaves_empty_can_be_initialized_afterwards() -> None:
    with constructing():
        model = nn.Module()
        model.weight = nn.Parameter(torch.empty(5, 5))
        half = torch.empty(4)
        half[:2] = 1
    nn.init.ones_(model.weight)
    assert model.weight.sum() == 25
    assert half[:2].tolist() == [1, 1]


def test_weights_that_are_loaded_inside_are_those_of_then() -> None:
    source = {name: torch.ones_like(value) for name, value in Net().state_dict().items()}
    with constructing():
        model = Net()
        model.load_state_dict(source)
        source["a.weight"].zero_()
    source["b.weight"].zero_()
    assert (nn.utils.parameters_to_vector(model.parameters()) == 1).all()


def test_meta_tensors_that_are_meant_stay() -> None:
    with constructing():
        model = nn.Sequential(nn.Linear(4, 4))
        with torch.device("meta"):
            model.append(nn.Linear(4, 4))
    assert model[0].weight.isfinite().all()
    assert model[1].weight.is_meta


def test_lazy_modules_stay_lazy() -> None:
    with constructing():
        model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(3))
    assert model(X).shape == (1, 3)


@pytest.mark.filterwarnings(SCRIPTING)
def test_recurrent_and_scripted_modules_work() -> None:
    torch.manual_seed(1)
    expected = nn.LSTM(8, 8)(X[None])[0], Net()(X)
    torch.manual_seed(1)
    with constructing():
        recurrent = nn.LSTM(8, 8)
        scripted = torch.jit.script(Net())
    assert torch.equal(recurrent(X[None])[0], expected[0])
    assert torch.equal(scripted(X), expected[1])


def test_blocks_nest_and_the_innermost_answer_counts() -> None:
    with deferred():
        before = nn.Linear(2, 2)
    with constructing():
        first = Net()
        nn.init.ones_(before.weight)
        with deferred():
            later = nn.Linear(2, 2)
        with eager():
            real = nn.Linear(2, 2)
            assert record_of(real.weight) is None
        with constructing():
            inner = Net()
            assert record_of(inner.a.weight) is not None
        last = Net()
    assert all(model(X).isfinite().all() for model in (first, inner, last))
    assert handle_of(later.weight) is not None
    assert materialize(before).weight.sum() == 4
    assert materialize(later).weight.isfinite().all()


def test_inside_other_contexts_it_does_nothing() -> None:
    with deferred():
        with constructing():
            layer = nn.Linear(2, 2)
    assert handle_of(layer.weight) is not None
    with eager(), constructing():
        assert not is_recording()
        assert record_of(nn.Linear(2, 2).weight) is None


def test_after_an_error_what_is_deferred_is_refused_by_name_and_the_stream_is_eagers() -> None:
    torch.manual_seed(1)
    Net()
    expected = torch.rand(4)
    made = []
    torch.manual_seed(1)

    def fail() -> None:
        with constructing():
            made.append(Net())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(torch.rand(4), expected)
    with pytest.raises(DeferredUseError, match=r"a\.weight is deferred"):
        made[0](X)


def test_a_parameter_that_torch_cannot_swap_is_replaced_and_a_warning_says_who_has_the_old_one() -> None:
    def construct() -> tuple[Net, torch.optim.Optimizer, weakref.ref[Tensor]]:
        with constructing():
            model = Net()
            return model, torch.optim.SGD(model.parameters(), lr=0.1), weakref.ref(model.a.weight)

    with pytest.warns(UserWarning, match=r"replaced a\.weight by new parameters"):
        model, optimizer, seen = construct()
    assert model(X).isfinite().all()
    assert seen() is optimizer.param_groups[0]["params"][0]
    with pytest.raises(DeferredUseError):
        seen() + 1


def test_a_weak_reference_that_nobody_backs_is_no_matter() -> None:
    with constructing():
        model = Net()
        seen = weakref.ref(model.a.weight)
    assert model(X).isfinite().all()
    assert seen() is None


BUILD = """
import torch
from torch import nn
from nucleate import Runtime

runtime = Runtime(accelerator="cpu")
with runtime.init_module():
    warm = nn.Linear(1100, 1100)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        for _ in range(8):
            self.layer = nn.Linear(2048, 2048)
            nn.init.normal_(self.layer.weight)

def construct():
    with runtime.init_module():
        return Model()
"""


def test_what_the_constructor_throws_away_takes_no_memory() -> None:
    # 16 MiB at the end, 128 MiB in all.
    assert peak_memory("model = construct()", BUILD).added_bytes < (16 + 12) * MIB
