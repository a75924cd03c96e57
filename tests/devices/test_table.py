"""Whose hooks answer for a device, and which devices a process uses."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from nucleate.accelerators import CPUAccelerator
from nucleate.devices import DeviceHooks, devices_taken, hooks_of, made_current, take_device, use_hooks
from nucleate.devices import table as module
from nucleate.devices.cpu import CPUHooks
from nucleate.devices.cuda import CUDAHooks
from nucleate.testing import TinyConvNet
from tests.accelerators.outsider import Outsider

XPU = torch.device("xpu", 0)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_chosen", {})
    monkeypatch.setattr(module, "_uses_several", False)
    taken = module._taken.copy()
    module._taken.clear()
    yield
    module._taken.clear()
    module._taken.update(taken)


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


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device")
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


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device")
def test_an_absent_device_has_no_state() -> None:
    assert hooks_of(XPU).random_state_of(XPU) is None
