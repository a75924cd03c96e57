"""Whose hooks answer for a device, and which devices a process uses."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nucleate import RandomState, Runtime
from nucleate.accelerators import CPUAccelerator
from nucleate.deferred import deferred
from nucleate.devices import (
    DeviceHooks,
    concrete,
    default_generator,
    devices_taken,
    hooks_of,
    made_current,
    take_device,
    use_hooks,
)
from nucleate.devices import table as module
from nucleate.devices.cpu import CPUHooks
from nucleate.devices.cuda import CUDAHooks
from nucleate.errors import ConfigurationError
from nucleate.materialize import materialize
from nucleate.testing import TinyConvNet
from tests.accelerators.outsider import Outsider
from tests.device import HAS_DEVICE

XPU = torch.device("xpu", 0)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_chosen", {})
    monkeypatch.setattr(module, "_uses_several", False)
    monkeypatch.setattr(module, "_taken", {})


def test_each_kind_has_hooks_without_an_accelerator() -> None:
    assert type(hooks_of(torch.device("cpu"))) is CPUHooks
    assert type(hooks_of(torch.device("cuda", 0))) is CUDAHooks
    assert type(hooks_of(XPU)) is DeviceHooks


def test_an_accelerator_in_use_answers_for_its_kind() -> None:
    hooks = Outsider("xpu")
    use_hooks("xpu", hooks)
    assert hooks_of(XPU) is hooks
    assert hooks_of(torch.device("xpu", 1)) is hooks


@pytest.mark.parametrize("kind", ["cpu", "cuda"], ids="on {}".format)
def test_an_accelerator_that_knows_less_of_a_kind_than_nucleate_does_not_answer_for_it(kind: str) -> None:
    use_hooks(kind, Outsider(kind))
    assert isinstance(hooks_of(torch.device(kind, 0)), CPUHooks if kind == "cpu" else CUDAHooks)
    own = CPUAccelerator()
    use_hooks("cpu", own)
    assert hooks_of(torch.device("cpu")) is own


def test_the_devices_of_living_accelerators_are_taken_in_their_order() -> None:
    first, second, third = Outsider("xpu"), Outsider("xpu"), CPUAccelerator()
    take_device(torch.device("xpu", 1), first)
    take_device(torch.device("xpu", 0), second)
    take_device(torch.device("cpu"), third)
    assert devices_taken() == [torch.device("xpu", 1), torch.device("xpu", 0)]
    del first
    gc.collect()
    assert devices_taken() == [torch.device("xpu", 0)]


@pytest.mark.skipif(HAS_DEVICE, reason="there is a device")
def test_a_process_on_the_cpu_has_taken_none() -> None:
    accelerator = CPUAccelerator()
    take_device(accelerator.select(0), accelerator)
    assert devices_taken() == []
    with made_current(torch.device("cpu")):
        assert TinyConvNet()(TinyConvNet().sample()).device.type == "cpu"


def test_the_cpu_pins_no_memory_and_computes_in_bfloat16() -> None:
    hooks = hooks_of(torch.device("cpu"))
    assert hooks.pins_memory is False
    assert hooks.supports_bfloat16(torch.device("cpu"))
    assert hooks.random_state_of(torch.device("cpu")) is None


@pytest.mark.skipif(HAS_DEVICE, reason="there is a device")
def test_an_absent_device_has_no_state() -> None:
    assert hooks_of(XPU).random_state_of(XPU) is None


@dataclass
class Equal(Outsider):
    """Compares by its fields, and so has no hash."""

    name: str = "xpu"


def test_accelerators_that_are_equal_and_have_no_hash_take_a_device_each() -> None:
    first, second = Equal(), Equal()
    take_device(torch.device("xpu", 1), first)
    take_device(torch.device("xpu", 0), second)
    take_device(torch.device("xpu", 0), second)
    assert devices_taken() == [torch.device("xpu", 1), torch.device("xpu", 0)]
    del first
    gc.collect()
    assert devices_taken() == [torch.device("xpu", 0)]
    assert Runtime(accelerator=Equal("cpu")).device == torch.device("cpu")


# -- devices that this process must not begin to use -----------------------------------------------------------------


def let_torch_name(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    current = torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: current)
    monkeypatch.setattr(torch.get_device_module(kind), "device_count", lambda: 1)


def test_a_module_without_a_current_device_has_that_of_torch_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    let_torch_name(monkeypatch, "mps")
    assert not hasattr(torch.mps, "current_device")
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    assert concrete("mps") == torch.device("mps", 0)
    assert devices_taken() == [torch.device("mps", 0)]
    assert Runtime(accelerator="cpu").device == torch.device("cpu")
    # Of two kinds of device one is the current accelerator.
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(device_count=lambda: 2))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    assert concrete("mps") == torch.device("mps", 1)
    assert concrete("xpu") == torch.device("xpu", 0)


@pytest.mark.parametrize("kind", ["cuda", "xpu"], ids="a machine with {}".format)
def test_a_run_on_the_cpu_begins_to_use_no_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    let_torch_name(monkeypatch, kind)
    torch_module: Any = torch.get_device_module(kind)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"{kind} is initialized")

    # Asking CUDA whether it is available spoils it for children that are forked later.
    for name in ("_lazy_init", "current_device", "is_available"):
        monkeypatch.setattr(torch_module, name, refuse)
    monkeypatch.setattr(torch_module, "is_initialized", lambda: False)
    queued: list[Any] = []
    monkeypatch.setattr(torch_module.random, "_lazy_call", lambda call, **_: queued.append(call))
    runtime = Runtime(accelerator="cpu")
    with runtime.init_module(empty_init=False):
        model = TinyConvNet()
    model, optimizer = runtime.setup(model, torch.optim.SGD(model.parameters(), 0.1))
    runtime.backward(model(TinyConvNet().sample()).sum())
    optimizer.step()
    with deferred():
        model = TinyConvNet()
    materialize(model)
    state = RandomState().state_dict()
    assert kind not in state["rank_0"]
    # torch sets the state of a run on the device as soon as somebody uses the device.
    state["rank_0"][kind] = {"1": torch.zeros(16, dtype=torch.uint8)}
    RandomState().load_state_dict(state)
    assert len(queued) == 1
    assert devices_taken() == []


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("npu", "torch .* knows no kind of device 'npu'. Give one that it knows, .* import that package first"),
        ("meta", "tensors on the meta device have no values. Give a device that holds them, such as 'cpu'"),
        ("xpu:-1", "'-1' is not the index of a device: give the number of one, such as 'xpu:0', or 'xpu'"),
        (torch.device("meta"), "tensors on the meta device have no values"),
    ],
    ids=str,
)
def test_what_cannot_hold_tensors_is_refused_in_our_words(device: Any, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=f"device={str(device)!r}: {reason}"), deferred(device):
        pass
    with pytest.raises(ConfigurationError, match=reason):
        concrete(device)
    assert default_generator(torch.device("cpu")) is torch.default_generator
