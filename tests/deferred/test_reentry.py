"""Contexts within contexts, contexts entered again for a model that is deferred, and what is made in parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import nn

from nucleate.deferred import convert, deferred, eager, handle_of, is_recording, resumed
from nucleate.errors import DeferredEditError, DeferredUseError, UninitializedError
from nucleate.materialize import materialize
from tests.deferred.equality import assert_same_model
from tests.deferred.rows import Rows
from tests.deferred.test_copies import Net


def assert_edit_exact(edit: Callable[[nn.Module], object]) -> nn.Module:
    """Assert that an edit in a second context, after the stream was used outside, is exact, also as to the stream."""

    def construct() -> nn.Module:
        model = Net()
        model.noise = torch.rand(3)
        return model

    torch.manual_seed(0)
    expected = construct()
    torch.rand(7)
    edit(expected)
    stream = torch.rand(3)
    torch.manual_seed(0)
    with deferred():
        model = construct()
    torch.rand(7)
    with deferred():
        edit(model)
    assert torch.equal(stream, torch.rand(3))
    for tensor in (*model.parameters(), *model.buffers()):
        assert handle_of(tensor) is not None
    materialize(model)
    assert_same_model(expected, model)
    return model


def init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def load(model: nn.Module) -> None:
    model.lstm.load_state_dict({name: torch.full_like(p, 0.5) for name, p in model.lstm.named_parameters()})


def compute(model: nn.Module) -> None:
    # Values are read back, compared and used, from the first recipe and the second one.
    if model.first.weight.std().item() > model.table.min():
        model.mixed = nn.Parameter(model.first.weight @ torch.randn(40, 40) + model.table.mean())


def replace_layers(model: nn.Module) -> None:
    model.first = nn.Linear(40, 40)
    model.first.weight.data[:20] = model.tied.weight.data[20:]


EDITS: dict[str, Callable[[nn.Module], object]] = {
    "nothing": lambda m: None,
    "apply": lambda m: m.apply(init),
    "a buffer": lambda m: m.table.mul_(2),
    "part of a storage": lambda m: m.rows.normal_(),
    "through data": lambda m: m.first.weight.data.uniform_(),
    "elements": lambda m: m.table.__setitem__((slice(None), 2), 7.0),
    "load_state_dict": load,
    "compute": compute,
    "replace": replace_layers,
    "tie": lambda m: setattr(m.tied, "bias", m.first.bias),
    "data": lambda m: setattr(m.frozen, "data", torch.randn(3, 3)),
    "data of another": lambda m: setattr(m.frozen, "data", m.first.weight.data[:3, :3]),
    "a parameter of a part": lambda m: setattr(m, "cut", nn.Parameter(m.first.weight[:3].detach())),
    "a parameter of a parameter": lambda m: setattr(m, "cut", nn.Parameter(m.first.weight)),
    "a copy": lambda m: setattr(m, "teacher", copy.deepcopy(m.lstm)),
    "a cast": lambda m: m.half(),
    "numpy": lambda m: m.table.numpy().fill(3),
    "storage": lambda m: m.table.untyped_storage().fill_(0),
    "foreach": lambda m: torch._foreach_mul_([m.first.weight.data, m.table], 3.0),
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m.tied, "bias"),
    "vector": lambda m: setattr(m, "all", nn.Parameter(nn.utils.parameters_to_vector(m.lstm.parameters()))),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_an_edit_in_a_second_context_is_exact(edit: Callable[[nn.Module], object]) -> None:
    assert_edit_exact(edit)


def assert_story_exact(story: Callable[[Callable[[], AbstractContextManager[object]]], nn.Module]) -> nn.Module:
    """Assert that a story told with `deferred` as the context gives what it gives with none."""
    torch.manual_seed(0)
    expected = story(nullcontext)
    stream = torch.rand(3)
    torch.manual_seed(0)
    model = story(deferred)
    assert torch.equal(stream, torch.rand(3))
    materialize(model)
    assert_same_model(expected, model)
    return model


def test_edits_in_many_contexts_add_up() -> None:
    def story(context: Callable[[], AbstractContextManager[object]]) -> nn.Module:
        with context():
            model = Net()
        for index in range(3):
            with context(), torch.no_grad():
                model.first.weight.add_(torch.randn(40, 40))
            model.to(torch.bfloat16 if index < 2 else torch.float32)
            model.add_module(f"teacher{index}", copy.deepcopy(model.first))
        return model

    assert_story_exact(story)


def test_models_of_several_contexts_can_be_mixed_in_another() -> None:
    def story(context: Callable[[], AbstractContextManager[object]]) -> nn.Module:
        with context():
            first = nn.Linear(30, 30)
        with context():
            second = nn.Linear(30, 30)
            untouched = nn.Linear(30, 30)
        with context(), torch.no_grad():
            third = nn.Linear(30, 30)
            third.weight.copy_(first.weight + second.weight)
            second.weight.mul_(third.weight)
            first.bias.uniform_()
        with context(), torch.no_grad():
            untouched.weight.add_(third.weight)
        return nn.ModuleList([first, second, third, untouched])

    assert_story_exact(story)


def test_records_that_met_keep_explicit_generators_as_they_are() -> None:
    generator = torch.Generator().manual_seed(5)
    with deferred():
        first = nn.Linear(30, 30)
        nn.init.normal_(first.weight, generator=generator)
    with deferred():
        second = nn.Linear(30, 30)
        second.weight.data.copy_(first.weight)
    state = generator.get_state()
    materialize(second)
    assert torch.equal(generator.get_state(), state)
    expected = torch.empty(30, 30).normal_(generator=torch.Generator().manual_seed(5))
    assert torch.equal(second.weight, expected)


def test_an_alias_may_be_edited_in_a_second_context_while_the_parameter_is_not_touched() -> None:
    with deferred():
        model = nn.Linear(3, 3)
    alias = model.weight.detach()
    with deferred():
        alias.fill_(2)
    materialize(model)
    assert torch.equal(model.weight, torch.full((3, 3), 2.0))


def test_an_edit_that_nobody_recorded_is_found_when_a_second_context_comes_across_it() -> None:
    with deferred():
        model = nn.Linear(3, 3)
        hidden = [model.weight.detach()]
    with torch._C.DisableTorchFunctionSubclass():
        hidden[0].zero_()
    with pytest.raises(DeferredEditError, match=r"weight was edited outside"), deferred():
        model.weight.data.add_(1)
    with pytest.raises(DeferredEditError, match=r"weight were edited outside"):
        materialize(model)


def test_resumed_is_a_second_context_for_one_model_and_nothing_for_a_real_one() -> None:
    with deferred():
        model = nn.Linear(3, 3)
    with resumed(model):
        assert is_recording()
        model.weight.data.fill_(1)
        model.extra = nn.Parameter(torch.zeros(3))
    assert handle_of(model.extra) is not None
    materialize(model)
    with resumed(model):
        assert not is_recording()
        assert not torch.empty(3).is_meta
    assert torch.equal(model.weight, torch.ones(3, 3))


def test_eager_inside_deferred_makes_real_tensors_from_the_same_stream() -> None:
    def story(context: Callable[[], AbstractContextManager[object]]) -> nn.Module:
        with context():
            model = nn.Module()
            model.a = nn.Linear(30, 30)
            with eager():
                model.b = nn.Linear(30, 30)
                nn.init.trunc_normal_(model.b.weight)
                assert not torch.empty(3).is_meta or context is not deferred
                assert handle_of(model.b.weight) is None
                assert model.b.weight.untyped_storage().data_ptr() != 0
                state = torch.get_rng_state()
                model.c = nn.Dropout()(torch.ones(20))
                torch.set_rng_state(state)
                with context():
                    model.d = nn.Linear(30, 30)
                # An operation on a deferred tensor stays deferred.
                model.e = nn.Parameter(model.a.weight.detach() + model.b.weight.detach())
            model.f = nn.Linear(30, 30)
            with torch.no_grad():
                model.b.weight.add_(model.f.weight)
        return model

    model = assert_story_exact(story)
    assert model.b.weight.isfinite().all()


def test_only_what_eager_made_is_real() -> None:
    with deferred():
        first = nn.Linear(3, 3)
        with eager():
            second = nn.Linear(3, 3)
            with deferred():
                third = nn.Linear(3, 3)
            fourth = nn.Linear(3, 3)
        fifth = nn.Linear(3, 3)
    deferred_ones = [handle_of(m.weight) is not None for m in (first, second, third, fourth, fifth)]
    assert deferred_ones == [True, False, True, False, True]
    with eager():
        assert not nn.Linear(3, 3).weight.is_meta


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_parts_that_share_memory_share_it_when_made_one_after_the_other(order: str) -> None:
    def make() -> nn.Module:
        model = nn.Module()
        model.a, model.b = nn.Linear(30, 30), nn.Module()
        model.b.rows = nn.Parameter(model.a.weight.data[3:7])
        model.b.register_buffer("column", model.a.weight.data[:, 1])
        return model

    torch.manual_seed(0)
    expected = make()
    torch.manual_seed(0)
    with deferred():
        model = make()
    for part in order:
        materialize(model.get_submodule(part))
        # What is done to the part that is there shows in the other.
        for either in (expected, model):
            next(either.get_submodule(part).parameters()).data.add_(1)
    materialize(model)
    assert_same_model(expected, model)


def test_what_shares_memory_with_a_part_that_is_there_has_to_be_made_too_before_it_is_read_or_edited() -> None:
    with deferred():
        model = nn.Module()
        model.a = nn.Linear(30, 30)
        model.b = nn.ParameterList([nn.Parameter(model.a.weight.data[3:7])])
    materialize(model.a)
    model.a.weight.data.add_(1)

    def in_context(act: Callable[[], object]) -> Callable[[], object]:
        def entered() -> None:
            with deferred():
                act()

        return entered

    acts = (lambda: copy.deepcopy(model), lambda: model.b.half(), lambda: model.b[0].clone())
    for act in (*acts, in_context(lambda: model.b[0].data.add_(1)), in_context(lambda: model.b[0].sum().item())):
        with pytest.raises(DeferredUseError, match=r"b\.0 is deferred, but shares its memory"):
            act()
    assert "b.0" in model.state_dict()
    materialize(model)
    assert torch.equal(model.b[0], model.a.weight[3:7])
    assert torch.equal(copy.deepcopy(model).b[0], model.b[0])


def test_what_was_made_is_not_kept_for_the_parts_that_share_its_memory() -> None:
    with deferred():
        model = nn.Module()
        model.a = nn.Linear(30, 30)
        model.b = nn.ParameterList([nn.Parameter(model.a.weight.data[3:7])])
    materialize(model.a)
    weight = model.a.weight.detach().clone()
    del model.a
    materialize(model)
    assert torch.equal(model.b[0], weight[3:7])


def test_what_fails_in_one_part_leaves_the_rest_deferred() -> None:
    torch.manual_seed(0)
    expected = nn.Linear(30, 30)
    torch.manual_seed(0)
    with deferred():
        model = nn.Sequential(nn.Linear(30, 30), nn.Module())
        model[1].forgotten = nn.Parameter(torch.empty(3))
    with pytest.raises(UninitializedError, match=r"1\.forgotten"):
        materialize(model)
    assert all(handle_of(parameter) is not None for parameter in model.parameters())
    materialize(model[0])
    assert_same_model(expected, model[0])
    with deferred():
        nn.init.ones_(model[1].forgotten)
    materialize(model)
    assert torch.equal(model[1].forgotten, torch.ones(3))


def test_a_model_of_two_recordings_is_changed_as_one() -> None:
    def halves() -> nn.Sequential:
        parts = []
        for _ in range(2):
            with deferred():
                parts.append(nn.Linear(4, 4, bias=False))
        return nn.Sequential(*parts)

    torch.manual_seed(0)
    model = halves()
    with resumed(model):
        for layer in model:
            codes, scales = convert(layer.weight, Rows())
            layer.weight = nn.Parameter(codes, requires_grad=False)
            layer.register_buffer("scales", scales)
    assert all(handle_of(tensor) is not None for tensor in (*model.parameters(), *model.buffers()))
    materialize(model)
    torch.manual_seed(0)
    for layer in model:
        codes, scales = convert(nn.Linear(4, 4, bias=False).weight, Rows())
        assert torch.equal(layer.weight, codes)
        assert torch.equal(layer.scales, scales)
