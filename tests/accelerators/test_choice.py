"""Which accelerator a name and `"auto"` stand for."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from nucleate import Accelerator
from nucleate.accelerators import CPUAccelerator, CUDAAccelerator, TorchAccelerator
from nucleate.accelerators.choice import choose
from nucleate.accelerators.generic import TorchAccelerator as Generic
from nucleate.errors import ConfigurationError, PluginLoadError, PluginNotFoundError
from nucleate.plugin import Named
from nucleate.registry import ACCELERATORS, Registry
from tests.accelerators.outsider import Outsider


class Absent(Outsider):
    @classmethod
    def is_available(cls) -> bool:
        return False


def install(monkeypatch: pytest.MonkeyPatch, plugins: Mapping[str, type[Accelerator] | None]) -> None:
    """Let other distributions offer accelerators; None cannot be loaded."""
    get = Registry.get

    def get_installed(registry: Registry, name: str) -> type[Named]:
        if name not in plugins:
            return get(registry, name)
        plugin = plugins[name]
        if plugin is None:
            raise PluginLoadError(f"accelerator {name!r} cannot be loaded")
        return plugin

    monkeypatch.setattr(Registry, "get", get_installed)
    monkeypatch.setattr(Registry, "installed_names", lambda registry: sorted(plugins))


def let_torch_name(monkeypatch: pytest.MonkeyPatch, kind: str | None) -> None:
    current = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: current)
    monkeypatch.setattr(Generic, "is_available", lambda self: self.name == kind)


def test_names_of_torch_are_names_here() -> None:
    assert {"cpu", "cuda", "mps", "xpu"} <= set(ACCELERATORS.names())
    assert type(ACCELERATORS.create("cuda")) is CUDAAccelerator
    xpu = ACCELERATORS.create("xpu")
    assert type(xpu) is TorchAccelerator
    assert xpu.name == "xpu"


def test_a_kind_that_only_torch_knows_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    let_torch_name(monkeypatch, "mtia")
    found = choose("mtia")
    assert type(found) is TorchAccelerator
    assert found.name == "mtia"


@pytest.mark.parametrize("name", ["meta", "nothing"])
def test_what_nobody_knows_is_not_found(name: str) -> None:
    with pytest.raises(PluginNotFoundError, match="Installed: cpu, cuda, mps, xpu"):
        choose(name)


@pytest.mark.parametrize(("kind", "expected"), [("cuda", CUDAAccelerator), ("xpu", TorchAccelerator)])
def test_auto_takes_what_torch_names(kind: str, expected: type, monkeypatch: pytest.MonkeyPatch) -> None:
    let_torch_name(monkeypatch, kind)
    found = choose("auto")
    assert type(found) is expected
    assert found.name == kind


def test_auto_takes_a_plugin_of_that_name_before_our_class(monkeypatch: pytest.MonkeyPatch) -> None:
    let_torch_name(monkeypatch, "mtia")
    install(monkeypatch, {"mtia": Outsider, "another": Outsider})
    assert type(choose("auto")) is Outsider
    install(monkeypatch, {"mtia": Absent, "another": Outsider})
    assert type(choose("auto")) is TorchAccelerator


def test_auto_takes_another_plugin_that_is_there_before_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    let_torch_name(monkeypatch, None)
    install(monkeypatch, {"a": Absent, "b": Outsider})
    assert type(choose("auto")) is Outsider
    install(monkeypatch, {"a": Absent})
    assert type(choose("auto")) is CPUAccelerator


def test_auto_passes_over_a_broken_plugin_and_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    let_torch_name(monkeypatch, None)
    install(monkeypatch, {"broken": None})
    with pytest.warns(UserWarning, match="skips a plugin: accelerator 'broken' cannot be loaded"):
        assert type(choose("auto")) is CPUAccelerator
    with pytest.raises(PluginLoadError):
        choose("broken")


class Broken(Outsider):
    @classmethod
    def from_name(cls, name: str) -> Outsider:
        raise OSError("no driver")


class Unsure(Outsider):
    @classmethod
    def is_available(cls) -> bool:
        raise ValueError("no answer")


@pytest.mark.parametrize(
    ("plugin", "reason"), [(Broken, "OSError: no driver"), (Unsure, "ValueError: no answer")], ids=["made", "asked"]
)
@pytest.mark.parametrize("current", [None, "mtia"])
def test_auto_passes_over_a_plugin_that_fails_with_any_error_and_names_it(
    plugin: type[Accelerator], reason: str, current: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_torch_name(monkeypatch, current)
    install(monkeypatch, {"mtia": plugin})
    with pytest.warns(UserWarning, match=f"skips a plugin: accelerator 'mtia' failed with {reason}"):
        assert type(choose("auto")) is (CPUAccelerator if current is None else TorchAccelerator)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("cuda:0", r"accelerator=CUDAAccelerator\(index=0\)"),
        ("xpu:1", r"accelerator=TorchAccelerator\('xpu', index=1\)"),
        ("hpu:1", r"accelerator=TorchAccelerator\('hpu', index=1\)"),
        ("cpu:0", "accelerator='cpu'"),
    ],
)
def test_a_name_with_an_index_is_refused_and_the_object_for_it_is_told(name: str, written: str) -> None:
    with pytest.raises(ConfigurationError, match=f"accelerator='{name}' names one device.*: give {written}."):
        choose(name)


def test_gpu_is_the_accelerator_that_torch_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    let_torch_name(monkeypatch, "xpu")
    assert choose("gpu").name == choose("GPU").name == "xpu"


def test_gpu_without_an_accelerator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    let_torch_name(monkeypatch, None)
    with pytest.raises(ConfigurationError, match="accelerator='gpu' takes the accelerator that.*finds none"):
        choose("gpu")


def test_names_may_be_in_upper_case_and_none_is_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    let_torch_name(monkeypatch, None)
    assert type(choose("CPU")) is type(choose(None)) is type(choose("Auto")) is CPUAccelerator


def test_a_tpu_is_refused_until_a_plugin_serves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginNotFoundError, match="accelerator='tpu' needs a plugin"):
        choose("TPU")
    install(monkeypatch, {"tpu": Outsider})
    monkeypatch.setattr(Registry, "names", lambda registry: ["cpu", "tpu"])
    assert type(choose("tpu")) is Outsider
