"""One class for every kind of device of torch.accelerator; what it says where there is none."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nucleate import Runtime
from nucleate.accelerators import CPUAccelerator, CUDAAccelerator, TorchAccelerator
from nucleate.cluster import Environment
from nucleate.errors import ConfigurationError
from nucleate.plugin import Composition
from nucleate.precision import FullPrecision
from nucleate.strategies import SingleDeviceStrategy
from tests.accelerators.outsider import Outsider
from tests.device import HAS_DEVICE


class Visible:
    """Stands for torch's module of a kind of device."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.current: torch.device | None = None

    def device_count(self) -> int:
        return self.count

    def set_device(self, device: torch.device) -> None:
        self.current = device

    def _is_compiled(self) -> bool:
        return True


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Visible:
    """Let torch see two devices of any kind."""
    visible = Visible(2)
    monkeypatch.setattr(torch, "get_device_module", lambda _: visible)
    return visible


def parts(accelerator: TorchAccelerator, **place: int) -> Composition:
    environment = Environment(**place)  # type: ignore[arg-type]
    return Composition(accelerator, FullPrecision(), SingleDeviceStrategy(), environment, torch.device("xpu", 0))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sim2", "torch .* knows no accelerator with that name. If another package adds it, import that package"),
        ("cpu", r"the CPU is not an accelerator of torch. Use CPUAccelerator\(\) or accelerator='cpu'"),
        ("cpu:0", "the CPU is not an accelerator of torch"),
        ("meta", "tensors on the meta device have no values"),
        ("cuda:1", r"the name of one device. Give the kind and the index: TorchAccelerator\('cuda', index=1\)"),
    ],
)
def test_what_is_not_an_accelerator_to_torch_is_refused(name: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"TorchAccelerator\('{name}'\): .*{reason}"):
        TorchAccelerator(name)


@pytest.mark.parametrize("index", [-1, True, "0", 1.0])
def test_an_index_is_a_number(index: object) -> None:
    with pytest.raises(ConfigurationError, match="must be None or the number of a device"):
        TorchAccelerator("xpu", index=index)  # type: ignore[arg-type]


@pytest.mark.skipif(HAS_DEVICE, reason="there is a device")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cuda", "was built without CUDA: install a build of torch that has it"),
        ("xpu", "was built without XPU: install a build of torch that has it"),
        ("mps", "was built without MPS: install a build of torch that has it"),
        ("hpu", "torch has no module torch.hpu: install the package that adds it, and import it"),
    ],
)
def test_a_torch_without_the_kind_is_told_apart(name: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=f"accelerator '{name}' was asked for, but .*{reason}, or use"):
        Runtime(accelerator=name)
    assert TorchAccelerator(name).is_available() is False
    assert TorchAccelerator(name).count() == 0
    with pytest.raises(ConfigurationError, match=reason):
        TorchAccelerator(name).select(0)


@pytest.mark.skipif(HAS_DEVICE, reason="there is a device")
def test_a_machine_without_the_device_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    with pytest.raises(ConfigurationError, match=r"sees no device: check the driver .*nvidia-smi.*VISIBLE_DEVICES"):
        Runtime(accelerator="cuda")
    monkeypatch.setattr(torch.xpu, "_is_compiled", lambda: True)
    with pytest.raises(ConfigurationError, match="'xpu' .* sees no device: check its driver, and whether this process"):
        Runtime(accelerator="xpu")


def test_an_outsiders_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outsider, "is_available", classmethod(lambda cls: False))
    with pytest.raises(ConfigurationError, match="this machine has no such device that this torch .* can use"):
        Runtime(accelerator=Outsider())
    monkeypatch.setattr(Outsider, "why_absent", lambda self: "it is switched off", raising=False)
    with pytest.raises(ConfigurationError, match="'cpu' was asked for, but it is switched off, or use"):
        Runtime(accelerator=Outsider())


def test_each_process_takes_the_device_of_its_local_rank(two: Visible) -> None:
    accelerator = TorchAccelerator("xpu")
    assert accelerator.is_available()
    assert accelerator.count() == 2
    assert accelerator.select(1) == two.current == torch.device("xpu", 1)
    assert accelerator.module_init_context() == torch.device("xpu", 1)
    with pytest.raises(ConfigurationError, match="local rank 2 has no xpu device: this node has 2"):
        accelerator.select(2)


def test_an_index_is_the_one_device(two: Visible) -> None:
    accelerator = TorchAccelerator("xpu", index=1)
    assert accelerator.count() == 1
    assert accelerator.select(0) == two.current == torch.device("xpu", 1)
    assert repr(accelerator) == "TorchAccelerator(name='xpu', index=1)"
    with pytest.raises(ConfigurationError, match=r"local rank 1 would share xpu:1. Leave the index out"):
        accelerator.select(1)
    absent = TorchAccelerator("xpu", index=2)
    assert absent.is_available() is False
    with pytest.raises(ConfigurationError, match="index=2 was given, and torch sees 2: give an index below 2"):
        absent.select(0)


def test_several_processes_of_a_node_are_refused_one_index(two: Visible, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = TorchAccelerator("xpu", index=0)
    monkeypatch.setattr(dist, "is_backend_available", lambda _: True)
    with pytest.raises(ConfigurationError, match=r"index=0\) is for one process on a node, but 2 processes"):
        accelerator.check(parts(accelerator, world_size=2, local_world_size=2))
    # One on each of two nodes share nothing.
    accelerator.check(parts(accelerator, world_size=2, local_world_size=1))
    TorchAccelerator("xpu").check(parts(accelerator, world_size=2, local_world_size=2))


def test_the_backend_is_torchs_default_beside_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_backend_available", lambda _: True)
    assert TorchAccelerator("xpu").backend == "cpu:gloo,xpu:xccl"
    assert CUDAAccelerator().backend == "cpu:gloo,cuda:nccl"
    assert TorchAccelerator("mps").backend == "cpu:gloo,mps:gloo"
    monkeypatch.delitem(dist.Backend.default_device_backend_map, "hpu", raising=False)  # torch's fake backend adds it
    assert TorchAccelerator("hpu").backend == "gloo"
    with pytest.raises(ConfigurationError, match="2 processes cannot exchange tensors on hpu devices"):
        TorchAccelerator("hpu").check(parts(TorchAccelerator("hpu"), world_size=2))


def test_a_backend_that_this_torch_lacks_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_backend_available", lambda name: name == "gloo")
    assert TorchAccelerator("xpu").backend == "gloo"
    assert TorchAccelerator("mps").backend == "cpu:gloo,mps:gloo"


def test_gloo_takes_the_place_of_a_backend_that_this_torch_lacks_where_it_serves_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dist, "is_backend_available", lambda name: name == "gloo")
    assert CUDAAccelerator().backend == "cpu:gloo,cuda:gloo"
    CUDAAccelerator().check(parts(CUDAAccelerator(), world_size=2, local_world_size=2))
    with pytest.raises(ConfigurationError, match="2 processes cannot exchange tensors on xpu devices"):
        TorchAccelerator("xpu").check(parts(TorchAccelerator("xpu"), world_size=2))
    monkeypatch.setattr(dist, "is_backend_available", lambda name: False)
    assert CUDAAccelerator().backend == "gloo"


def test_an_outsiders_class_attributes_hold() -> None:
    assert Outsider().backend == "gloo"
    assert Outsider().pins_memory is True
    assert CPUAccelerator().pins_memory is False
    runtime = Runtime(accelerator=Outsider())
    assert runtime.device == torch.device("cpu")
