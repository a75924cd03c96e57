"""When an integration is active, and what a runtime asks it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from torch import nn

from nucleate import Integration, Runtime
from nucleate.cluster import Environment
from nucleate.errors import ConfigurationError, PluginNotFoundError
from nucleate.integrations import active
from nucleate.plugin import Composition
from nucleate.precision import FullPrecision
from nucleate.registry import INTEGRATIONS, Registry
from nucleate.testing import IntegrationSuite
from tests.device import ACCELERATOR, device
from tests.integrations import fake_library

LIBRARY = "nucleate_fake_library"


class FakeIntegration(Integration):
    name = LIBRARY
    made: ClassVar[list[FakeIntegration]] = []

    def __init__(self) -> None:
        self.events: list[str] = []
        self.made.append(self)

    def check(self, composition: Composition) -> None:
        self.events.append(f"check {composition.precision.name}")

    def connect(self, device: torch.device, environment: object) -> None:
        self.events.append(f"connect {device}")

    @contextmanager
    def module_init_context(self) -> Iterator[None]:
        self.events.append("enter")
        before, fake_library.default_width = fake_library.default_width, lambda: 3
        try:
            yield
        finally:
            fake_library.default_width = before
            self.events.append("exit")

    def setup(self, model: nn.Module) -> nn.Module:
        self.events.append("setup")
        return model

    def inference_methods(self, model: nn.Module) -> Iterable[str]:
        return ["generate"] if isinstance(model, fake_library.Model) else []


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry in which the integration is found by the name of its library."""
    registry = Registry(INTEGRATIONS.kind, INTEGRATIONS.group, INTEGRATIONS.base, {})
    point = EntryPoint(LIBRARY, f"{__name__}:FakeIntegration", INTEGRATIONS.group)
    monkeypatch.setitem(vars(registry), "_installed", {LIBRARY: [point]})
    monkeypatch.setitem(sys.modules, __name__, sys.modules[FakeIntegration.__module__])
    monkeypatch.setattr(active, "INTEGRATIONS", registry)
    FakeIntegration.made.clear()


class TestFake(IntegrationSuite):
    @pytest.fixture(autouse=True)
    def library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, LIBRARY, fake_library)
        monkeypatch.setattr(fake_library, "__name__", LIBRARY)

    def make_integration(self) -> Integration:
        return FakeIntegration()

    def construct(self) -> nn.Module:
        return fake_library.Model()


@pytest.mark.usefixtures("registered")
def test_an_integration_is_not_made_as_long_as_nobody_imported_its_library() -> None:
    one = Runtime(accelerator=ACCELERATOR)
    with one.init_module():
        model = nn.Linear(2, 2)
    one.setup(model)
    assert FakeIntegration.made == []


@pytest.mark.usefixtures("registered")
def test_it_is_active_from_the_first_construction_or_setup_after_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Runtime(accelerator=ACCELERATOR, precision="bf16-true")
    monkeypatch.setitem(sys.modules, LIBRARY, ModuleType(LIBRARY))
    assert FakeIntegration.made == []
    with one.init_module():
        model = nn.Linear(2, 2)
    one.setup(model)
    [made] = FakeIntegration.made
    assert made.events == ["check bf16-true", f"connect {device()}", "enter", "exit", "setup"]
    one.setup(nn.Linear(2, 2))
    assert FakeIntegration.made == [made]


@pytest.mark.usefixtures("registered")
def test_a_list_with_integrations_names_all_that_are_active_beside_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, LIBRARY, ModuleType(LIBRARY))
    mine = FakeIntegration()
    mine.name = "another_library"
    with Runtime(accelerator=ACCELERATOR, plugins=[mine]).init_module():
        pass
    assert FakeIntegration.made == [mine]
    monkeypatch.delitem(sys.modules, LIBRARY)
    with Runtime(accelerator=ACCELERATOR, plugins=[LIBRARY]).init_module():
        pass
    assert [made.events[-1] for made in FakeIntegration.made] == ["exit", "exit"]


@pytest.mark.usefixtures("registered")
def test_a_list_without_an_integration_leaves_all_of_them_active(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, LIBRARY, ModuleType(LIBRARY))
    for plugins in ([], FullPrecision(torch.float32), [Environment()]):
        runtime = Runtime(accelerator=ACCELERATOR, plugins=plugins)
        with runtime.init_module():
            pass
    assert [made.events[-1] for made in FakeIntegration.made] == ["exit"] * 3


def test_the_files_that_nucleate_reads_itself_stay_lazy_beside_another_integration(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, path)
    runtime = Runtime(accelerator=ACCELERATOR, plugins=FakeIntegration())
    with runtime.init_module(empty_init=True):
        read = torch.load(path)["weight"]
    with torch._C.DisableTorchFunctionSubclass():
        assert read.is_meta


def test_two_integrations_with_one_name_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="two integrations named"):
        Runtime(accelerator=ACCELERATOR, plugins=[FakeIntegration(), FakeIntegration()])


def test_what_is_no_integration_is_refused_by_name() -> None:
    with pytest.raises(PluginNotFoundError, match="no integration plugin named 'tranformers'.*'transformers'"):
        Runtime(accelerator=ACCELERATOR, plugins=["tranformers"])
    with pytest.raises(PluginNotFoundError, match="no integration plugin named 'tranformers'"):
        Runtime(accelerator=ACCELERATOR, plugins="tranformers")
    with pytest.raises(ConfigurationError, match="which is not a plugin of these kinds"):
        Runtime(accelerator=ACCELERATOR, plugins=[nn.Linear])  # type: ignore[list-item]


def test_an_inference_method_goes_through_the_precision() -> None:
    one = Runtime(accelerator=ACCELERATOR, precision="bf16-true", plugins=[FakeIntegration()])
    model = one.setup(fake_library.Model())
    # Inputs are cast on the way in, outputs on the way out; an unmarked method would fail on the mix of dtypes.
    assert model.generate(torch.ones(2, 3, device=device())).dtype == torch.float32
