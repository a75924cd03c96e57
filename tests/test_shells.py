"""Shells: modules of other libraries in a tree do not show in its names, and can be taken out for a while."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

from nucleate.integrations import declare_shell
from nucleate.shells import (
    apply_inside,
    content,
    full_name,
    has_shells,
    inside,
    named_buffers,
    named_modules,
    named_parameters,
    plain_name,
    state_dict,
    without_shells,
)


class Foreign(nn.Module):
    """A wrapper of a library that nucleate does not know."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.held = wrapped

    def forward(self, x: Tensor) -> Any:
        return self.held(x)


declare_shell(Foreign, "held")


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


SHELLS = {
    "torch.compile": compiled,
    "checkpoint": checkpoint_wrapper,
    "offload": offload_wrapper,
    "DataParallel": nn.DataParallel,
    "declared": Foreign,
    "two": lambda module: compiled(checkpoint_wrapper(module)),
    "the other two": lambda module: checkpoint_wrapper(compiled(module)),
    "three": lambda module: Foreign(compiled(nn.DataParallel(module))),
}
every_shell = pytest.mark.parametrize("shell", SHELLS.values(), ids=SHELLS)


def body() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


def wrapped(shell: Any, at: str) -> nn.Module:
    """Return the body with a shell around the root, a leaf, a container, or all of them."""
    model = body()
    if at in ("leaf", "all"):
        model[0] = shell(model[0])
    if at in ("container", "all"):
        model[1] = shell(model[1])
    return shell(model) if at in ("root", "all") else model


PLACES = ("root", "leaf", "container", "all")


@pytest.mark.parametrize("at", PLACES)
@every_shell
def test_names_and_keys_are_those_of_the_plain_model(shell: Any, at: str) -> None:
    plain, model = body(), wrapped(shell, at)
    assert [name for name, _ in named_parameters(model)] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in named_buffers(model)] == [name for name, _ in plain.named_buffers()]
    assert dict.fromkeys(name for name, _ in named_modules(model)) == dict.fromkeys(dict(plain.named_modules()))
    assert {name: type(module) for name, module in named_modules(model)} == {
        name: type(module) for name, module in plain.named_modules()
    }
    found = state_dict(model, keep_vars=True)
    assert list(found) == list(plain.state_dict())
    assert found._metadata == plain.state_dict()._metadata
    assert found["0.weight"] is inside(inside(model)[0]).weight


@pytest.mark.parametrize("at", PLACES)
@every_shell
def test_the_full_name_is_torchs_own(shell: Any, at: str) -> None:
    model = wrapped(shell, at)
    for name, parameter in named_parameters(model):
        assert model.get_parameter(full_name(model, name)) is parameter
        assert model.get_parameter(full_name(model, full_name(model, name))) is parameter
        assert plain_name(model, full_name(model, name)) == name
        assert plain_name(model, name) == name
    assert plain_name(model, "") == full_name(model, "") == ""
    assert plain_name(model, "1.nothing.here") == "1.nothing.here"


def test_a_model_without_shells_keeps_all_its_names() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)
            self._orig_mod = nn.Linear(2, 2)

    model = nn.ModuleDict({"inner": Model()})
    assert not has_shells(model)
    assert list(state_dict(model)) == list(model.state_dict())
    assert [name for name, _ in named_modules(model)] == [name for name, _ in model.named_modules()]
    assert content(model) is None
    assert inside(model) is model


def test_the_models_own_child_of_that_name_stays() -> None:
    inner = nn.Module()
    inner.module = nn.Linear(2, 2)
    model = nn.ModuleDict({"net": nn.DataParallel(inner)})
    assert list(state_dict(model)) == ["net.module.weight", "net.module.bias"]
    assert plain_name(model, "net.module.module.weight") == "net.module.weight"


def test_a_state_dict_goes_into_a_destination_behind_a_prefix() -> None:
    found = {"other": 1}
    state_dict(nn.Sequential(compiled(nn.Linear(1, 1))), destination=found, prefix="a.")
    assert list(found) == ["other", "a.0.weight", "a.0.bias"]


def test_tied_modules_and_parameters_keep_their_names() -> None:
    layer = compiled(nn.Linear(2, 2))
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(2, 2)})
    model["c"].weight = layer.weight
    assert [name for name, _ in named_parameters(model)] == ["a.weight", "a.bias", "c.bias"]
    names = [name for name, _ in named_parameters(model, remove_duplicate=False)]
    assert names == ["a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "c.bias"]
    assert list(state_dict(model)) == names


@pytest.mark.parametrize("at", PLACES)
@every_shell
def test_a_tree_without_its_shells_is_the_plain_model_and_gets_them_back(shell: Any, at: str) -> None:
    model = wrapped(shell, at)
    names = [name for name, _ in model.named_modules()]
    with without_shells(model) as plain:
        assert list(dict(plain.named_modules())) == list(dict(body().named_modules()))
        with without_shells(plain) as again:
            assert again is plain
        plain.load_state_dict(body().state_dict())
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.weight"'):
            plain.load_state_dict({})
    assert [name for name, _ in model.named_modules()] == names
    with pytest.raises(ZeroDivisionError), without_shells(model):
        raise ZeroDivisionError
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("at", PLACES)
@every_shell
def test_a_module_that_is_replaced_inside_is_wrapped_and_called(shell: Any, at: str) -> None:
    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    def replace(plain: nn.Module) -> nn.Module:
        plain[0] = Doubling()
        plain[1] = Doubling()
        return plain

    model = wrapped(shell, at)
    assert apply_inside(model, replace) is model
    assert torch.equal(model(torch.ones(2, 3)), torch.full((2, 3), 4.0))
    model = wrapped(shell, at)
    made = apply_inside(model, lambda _: Doubling())
    assert (made is model) is (at in ("root", "all"))
    assert torch.equal(made(torch.ones(2, 3)), torch.full((2, 3), 2.0))


def test_a_shell_that_stands_in_two_places_is_refilled_once() -> None:
    layer = compiled(nn.Linear(2, 2))
    model = nn.Sequential(layer, layer)
    new = nn.Identity()

    def replace(plain: nn.Module) -> nn.Module:
        plain[0] = plain[1] = new
        return plain

    apply_inside(model, replace)
    assert model[0] is model[1] is layer
    assert content(layer) is new


def test_the_classes_of_torch_are_still_named_so() -> None:
    from torch._dynamo.eval_frame import OptimizedModule
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    from nucleate.shells import _KNOWN
    from nucleate.wrappers.delegation import Delegating

    classes = (Delegating, OptimizedModule, ActivationWrapper, DataParallel, DistributedDataParallel)
    assert {f"{cls.__module__}.{cls.__qualname__}" for cls in classes} == set(_KNOWN)
