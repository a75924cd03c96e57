"""The names of a wrapper are those of the plain model, whatever wraps its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from nucleate import Runtime
from nucleate.errors import DeferredUseError, UninitializedError, UsageError
from nucleate.wrappers import ModuleWrapper
from tests.test_shells import PLACES, body, compiled, every_shell, wrapped


def set_up(model: nn.Module) -> ModuleWrapper:
    return Runtime(accelerator="cpu", strategy="single_device").setup(model)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("at", PLACES)
@every_shell
def test_a_wrapper_names_the_plain_model(shell: Any, at: str, late: bool) -> None:
    plain = body()
    wrapper = set_up(body() if late else wrapped(shell, at))
    if late and at != "root":
        wrapper.module[0] = shell(wrapper.module[0])
    assert list(wrapper.state_dict()) == list(plain.state_dict())
    assert wrapper.state_dict()._metadata == plain.state_dict()._metadata
    assert list(wrapper.state_dict(prefix="a.")) == [f"a.{key}" for key in plain.state_dict()]
    for name in ("named_parameters", "named_buffers"):
        assert [key for key, _ in getattr(wrapper, name)()] == [key for key, _ in getattr(plain, name)()]
        assert [key for key, _ in getattr(wrapper, name)("a")] == [key for key, _ in getattr(plain, name)("a")]
    assert [key for key, _ in wrapper.named_children()] == ["0", "1"]
    assert dict.fromkeys(key for key, _ in wrapper.named_modules()) == dict.fromkeys(dict(plain.named_modules()))
    assert dict.fromkeys(key for key, _ in wrapper.named_modules(prefix="a")) == dict.fromkeys(
        dict(plain.named_modules(prefix="a"))
    )
    for key, parameter in wrapper.named_parameters():
        assert wrapper.get_parameter(key) is parameter
    assert wrapper.get_buffer("1.1.running_mean") is dict(wrapper.named_buffers())["1.1.running_mean"]
    assert isinstance(wrapper.get_submodule("1.0"), nn.Linear)


def test_assigned_values_are_copied_so_that_the_optimizer_goes_on() -> None:
    runtime = Runtime(accelerator="cpu", strategy="single_device")
    model = nn.Linear(2, 2)
    wrapper, optimizer = runtime.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
    kept = wrapper.weight
    wrapper.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.zeros(2)}, assign=True)
    assert wrapper.weight is kept
    runtime.backward(wrapper(torch.ones(1, 2)).sum())
    optimizer.step()
    assert torch.equal(wrapper.weight, torch.zeros(2, 2))


@pytest.mark.parametrize("at", PLACES)
@every_shell
def test_a_wrapper_loads_the_keys_of_the_plain_model_and_complains_in_them(shell: Any, at: str) -> None:
    wrapper, other = set_up(wrapped(shell, at)), body()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(3)
    assert str(wrapper.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    assert all((parameter == 3).all() for parameter in wrapper.parameters())
    with pytest.raises(RuntimeError) as error:
        wrapper.load_state_dict({"0.weight": torch.ones(1), "strange": torch.ones(1)})
    assert '"0.bias"' in str(error.value)
    assert "size mismatch for 0.weight" in str(error.value)
    assert not any(word in str(error.value) for word in ("_orig_mod", "_checkpoint_wrapped", "module.", "held."))


@every_shell
def test_a_set_submodule_takes_the_place_of_the_shell(shell: Any) -> None:
    wrapper = set_up(wrapped(shell, "leaf"))
    assert wrapper.get_submodule("0") is wrapper.module[0]
    wrapper.set_submodule("0", new := nn.Linear(3, 3))
    assert wrapper.module[0] is new
    wrapper.get_submodule("1").register_buffer("table", torch.ones(1))
    assert "1.table" in wrapper.state_dict()


@pytest.mark.parametrize("at", PLACES)
@every_shell
def test_a_wrapper_inside_another_module_has_plain_names_and_loads_them(shell: Any, at: str) -> None:
    parent, other = nn.ModuleDict(), nn.ModuleDict()
    parent["child"], other["child"] = set_up(wrapped(shell, at)), body()
    assert list(parent.state_dict()) == list(other.state_dict())
    if at != "root":
        names = [name for name, _ in parent.named_parameters()]
        assert names == [name for name, _ in other.named_parameters()]
    with torch.no_grad():
        other["child"][0].weight.fill_(5)
    parent.load_state_dict(other.state_dict())
    assert (parent["child"].get_parameter("0.weight") == 5).all()


def test_an_average_of_weights_keeps_its_own_keys() -> None:
    average = AveragedModel(nn.Sequential(compiled(nn.Linear(1, 1))))
    assert list(set_up(average).state_dict()) == ["n_averaged", "module.0.weight", "module.0.bias"]


@every_shell
def test_errors_of_setup_use_plain_names(shell: Any) -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2))

    runtime = Runtime(accelerator="cpu", strategy="single_device")
    with runtime.init_module(empty_init=True):
        model = nn.Sequential(shell(nn.Sequential(Empty())))
    with pytest.raises(UninitializedError, match="nothing initializes 0.0.weight: ") as error:
        runtime.setup(model)
    assert "0.0 (Empty) has no `reset_parameters`" in str(error.value)
    part = nn.Linear(2, 2)
    runtime.setup(part)
    with pytest.raises(UsageError, match="^0.0 of this model has been set up already"):
        runtime.setup(nn.Sequential(shell(nn.Sequential(part))))


@every_shell
def test_the_guards_of_deferred_tensors_use_plain_names(shell: Any) -> None:
    runtime = Runtime(accelerator="cpu", strategy="single_device")
    with runtime.init_module(empty_init=True):
        model = nn.Sequential(shell(nn.Sequential(nn.Linear(2, 2))))
    weight = next(iter(model.parameters()))
    with pytest.raises(DeferredUseError, match=r"\b0\.0\.weight\b") as error:
        weight.sum()
    assert not any(word in str(error.value) for word in ("_orig_mod", "_checkpoint_wrapped", "module.", "held."))


def test_checkpoint_wrapper_at_the_root_is_the_users_model() -> None:
    model = checkpoint_wrapper(nn.Sequential(nn.Linear(3, 3)))
    wrapper = set_up(model)
    assert wrapper.module is model
    wrapper(torch.ones(1, 3)).sum().backward()
    assert dict(wrapper.named_parameters())["0.weight"].grad is not None
    with pytest.raises(UsageError, match="this Sequential has been set up already"):
        Runtime(accelerator="cpu", strategy="single_device").setup(wrapper)
