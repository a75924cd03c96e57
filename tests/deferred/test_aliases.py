"""Ways around the guard: each edit of a deferred tensor is an error or part of its recipe, whatever it goes through."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nucleate.deferred import deferred
from nucleate.errors import DeferredEditError, DeferredUseError
from nucleate.materialize import materialize
from tests.deferred.equality import assert_exact, assert_same_model
from tests.deferred.test_copies import Net

ALIASES: dict[str, Callable[[nn.Linear], Tensor]] = {
    "data": lambda m: m.weight.data,
    "detached": lambda m: m.weight.detach(),
    "view": lambda m: m.weight[1:, ::2].detach(),
    "view of data": lambda m: m.weight.data.t()[0],
    "rest of a split": lambda m: m.weight.detach().chunk(2)[1],
    "strided": lambda m: torch.as_strided(m.weight.data, (2, 2), (1, 2)),
    "numpy's": lambda m: torch.from_numpy(m.weight.detach().numpy()),
    "state_dict": lambda m: m.state_dict()["weight"],
    "second parameter": lambda m: nn.Parameter(m.weight.data),
}


@pytest.mark.parametrize("taken", ["inside", "outside"])
@pytest.mark.parametrize("take", ALIASES.values(), ids=ALIASES.keys())
def test_an_edit_through_an_alias_is_refused_or_recorded(take: Callable[[nn.Linear], Tensor], taken: str) -> None:
    torch.manual_seed(0)
    expected = nn.Linear(4, 4)
    with torch.no_grad():
        take(expected).fill_(7)
    torch.manual_seed(0)
    with deferred():
        model = nn.Linear(4, 4)
        alias = take(model) if taken == "inside" else None
    try:
        with torch.no_grad():
            (take(model) if alias is None else alias).fill_(7)
    except (DeferredEditError, DeferredUseError):
        torch.manual_seed(0)
        expected = nn.Linear(4, 4)
    materialize(model)
    assert_same_model(expected, model)


def test_an_alias_whose_guard_is_gone_around_is_found_in_setup() -> None:
    with deferred():
        model = nn.Sequential(nn.Linear(4, 4))
        view = model[0].weight.detach()
    with torch._C.DisableTorchFunctionSubclass():
        view.zero_()
    with pytest.raises(DeferredEditError, match=r"0\.weight were edited outside"):
        materialize(model)


def test_a_tensor_that_was_set_to_other_memory_is_found_in_setup() -> None:
    with deferred():
        model = Net()
    with torch._C.DisableTorchFunctionSubclass():
        model.table.set_()
    with pytest.raises(DeferredEditError, match=r"table.* were edited outside"):
        materialize(model)


STORAGE_EDITS: dict[str, Callable[[torch.UntypedStorage], object]] = {
    "fill": lambda s: s.fill_(0),
    "copy": lambda s: s.copy_(torch.zeros(4, 4).untyped_storage()),
    "element": lambda s: s.__setitem__(0, 1),
}


@pytest.mark.parametrize("edit", STORAGE_EDITS.values(), ids=STORAGE_EDITS.keys())
def test_an_edit_of_a_storage_taken_inside_is_seen(edit: Callable[[torch.UntypedStorage], object]) -> None:
    torch.manual_seed(0)
    expected = nn.Linear(4, 4)
    edit(expected.weight.untyped_storage())
    torch.manual_seed(0)
    with deferred():
        model = nn.Linear(4, 4)
        storage = model.weight.untyped_storage()
    edit(storage)
    materialize(model)
    assert torch.equal(model.weight, expected.weight)
    storage.fill_(0)
    assert torch.equal(model.weight, torch.zeros(4, 4))


def test_what_numpy_writes_afterwards_is_part_of_the_recipe() -> None:
    with deferred():
        model = nn.Linear(4, 4)
        array = model.weight.detach().numpy()
    array[:] = 5
    materialize(model)
    assert torch.equal(model.weight, torch.full((4, 4), 5.0))


def test_swapped_tensors_are_swapped_and_keep_their_recipes() -> None:
    def make() -> nn.Module:
        return nn.ModuleList([nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 30)])

    def swap(model: nn.Module, real: nn.Module) -> None:
        torch.utils.swap_tensors(model[0].weight, model[1].weight)
        torch.utils.swap_tensors(model[2].weight, real.weight)
        model.append(real)

    torch.manual_seed(0)
    real, twin = nn.Linear(30, 30), nn.Linear(30, 30)
    twin.load_state_dict(real.state_dict())
    torch.manual_seed(0)
    expected = make()
    swap(expected, real)
    torch.manual_seed(0)
    with deferred():
        model = make()
    swap(model, twin)
    assert not model[2].weight.is_meta
    assert model[2].weight.sum().isfinite()
    materialize(model)
    assert_same_model(expected, model)


def test_tensors_may_be_swapped_inside_a_context() -> None:
    def make() -> nn.Module:
        model = nn.ModuleList([nn.Linear(30, 30), nn.Linear(30, 30)])
        torch.utils.swap_tensors(model[0].weight, model[1].weight)
        nn.init.zeros_(model[0].weight)
        return model

    assert_exact(make)


def test_an_optimizer_can_be_stepped_only_where_there_is_nothing_to_do() -> None:
    with deferred():
        model = nn.Linear(4, 4)
    for make in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad):
        optimizer = make(model.parameters(), lr=0.1)
        optimizer.zero_grad()
        optimizer.step()  # Without gradients it does nothing, for real models too.
    with pytest.raises(DeferredEditError, match="weight is deferred, and assigning its `.grad` would edit it"):
        model.weight.grad = torch.ones(4, 4)
    with pytest.raises(DeferredEditError, match=r"weight is deferred"), torch.no_grad():
        model.weight -= 0.1 * torch.ones(4, 4)


def test_load_state_dict_may_assign_outside_the_context_and_copy_inside() -> None:
    state = {"weight": torch.full((4, 4), 2.0), "bias": torch.full((4,), 3.0)}
    with deferred():
        model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    model.load_state_dict(state, assign=True)
    assert type(model.weight) is nn.Parameter
    with deferred():
        other.load_state_dict(state)
    for each in (model, other):
        materialize(each)
        assert torch.equal(each.weight, state["weight"])
        assert torch.equal(each.bias, state["bias"])


def test_a_refused_edit_changes_nothing() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(30, 30), nn.BatchNorm1d(30))

    torch.manual_seed(0)
    expected = make()
    torch.manual_seed(0)
    with deferred():
        model = make()
    for edit in (
        lambda: model.apply(lambda m: nn.init.normal_(m.weight)),
        lambda: model(torch.ones(3, 30)),
        lambda: nn.utils.parametrizations.weight_norm(model[0]),
        lambda: nn.utils.parametrizations.orthogonal(model[0]),
        lambda: model.to("meta"),
        lambda: torch.nn.utils.vector_to_parameters(torch.zeros(990), model.parameters()),
    ):
        with pytest.raises((DeferredEditError, DeferredUseError), match=r"0\.weight"):
            edit()
    materialize(model)
    assert_same_model(expected, model)
