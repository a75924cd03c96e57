"""The integration suite: tests for every integration, which a plugin's test class inherits."""

from __future__ import annotations

import importlib
import sys
from abc import ABC, abstractmethod
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nucleate.deferred import handle_of
from nucleate.integrations.base import Integration
from nucleate.runtime import Runtime
from nucleate.testing.models import MODELS, TinyModel


class IntegrationSuite(ABC):
    """The suite of integrations. Inherit it, name the class `Test...`; implement `make_integration` and `construct`.

    If the library loads weights, implement `store` and `load` too. `load` must then return models whose tensors are
    bound to the stored files.

    Attributes:
        loads: Whether the library loads weights.
    """

    loads: bool = False

    @abstractmethod
    def make_integration(self) -> Integration:
        """Return a new integration with the options to test."""

    @abstractmethod
    def construct(self) -> nn.Module:
        """Construct a small model with random weights, by the library's functions."""

    def store(self, model: nn.Module, folder: Path) -> None:
        """Write a model by the library's functions."""
        raise NotImplementedError

    def load(self, folder: Path) -> nn.Module:
        """Load the model that `store` wrote, by the library's functions."""
        raise NotImplementedError

    @pytest.fixture
    def runtime(self) -> Runtime:
        """A runtime on one device with a new integration."""
        return Runtime(accelerator="cpu", strategy="single_device", devices=1, plugins=[self.make_integration()])

    @pytest.fixture
    def integration(self) -> Integration:
        """A new integration."""
        return self.make_integration()

    def test_it_has_a_kind_and_the_name_of_its_library(self, integration: Integration) -> None:
        assert integration.kind == "integration"
        assert importlib.import_module(integration.name).__name__ == integration.name
        assert "." not in integration.name

    @pytest.mark.parametrize("raises", [False, True])
    def test_the_library_is_as_it_was_when_its_context_ends(self, integration: Integration, raises: bool) -> None:
        self.construct()  # Imports and caches of the library at the first construction are not patches.
        before = _bindings(integration.name)
        with pytest.raises(ZeroDivisionError) if raises else nullcontext(), integration.module_init_context():
            self.construct()
            if raises:
                raise ZeroDivisionError
        after = _bindings(integration.name)
        assert [name for name, value in before.items() if after.get(name) is not value] == []

    def test_contexts_nest_and_come_again(self, integration: Integration) -> None:
        before = _bindings(integration.name)
        for _ in range(2):
            with integration.module_init_context(), self.make_integration().module_init_context():
                self.construct()
            after = _bindings(integration.name)
            assert [name for name, value in before.items() if after.get(name) is not value] == []

    def test_models_of_the_library_are_the_same_deferred_and_real(self, runtime: Runtime) -> None:
        made = []
        for empty_init in (True, False):
            torch.manual_seed(11)
            with runtime.init_module(empty_init=empty_init):
                model = self.construct()
            assert all((handle_of(parameter) is not None) == empty_init for parameter in model.parameters())
            made.append(_values(runtime.setup(model)))
        _assert_equal(*made)

    def test_setup_gives_the_model_itself_and_may_come_twice(self, integration: Integration) -> None:
        model = self.construct()
        before = _values(model)
        assert integration.setup(model) is model
        assert integration.setup(model) is model
        _assert_equal(_values(model), before)

    @pytest.mark.parametrize("model_class", MODELS, ids=lambda cls: cls.__name__)
    def test_models_of_others_are_left_alone(self, integration: Integration, model_class: type[TinyModel]) -> None:
        torch.manual_seed(3)
        expected = _values(model_class())
        torch.manual_seed(3)
        with integration.module_init_context():
            model = model_class()
        assert integration.setup(model) is model
        assert list(integration.inference_methods(model)) == []
        _assert_equal(_values(model), expected)

    def test_inference_methods_are_methods_of_the_model(self, integration: Integration) -> None:
        model = self.construct()
        assert all(callable(getattr(model, name)) for name in integration.inference_methods(model))

    def test_what_is_loaded_is_bound_to_its_file_and_read_at_setup(self, runtime: Runtime, tmp_path: Path) -> None:
        if not self.loads:
            return
        model = self.construct()
        expected = _values(model)
        self.store(model, tmp_path)
        torch.manual_seed(5)
        with runtime.init_module(empty_init=True):
            loaded = self.load(tmp_path)
        assert all(handle_of(parameter) is not None for parameter in loaded.parameters())
        _assert_equal(_values(runtime.setup(loaded)), expected)


def _bindings(library: str) -> dict[str, object]:
    """Return the callables in the modules and classes of a library, by their names."""
    found: dict[str, object] = {}
    for name, module in list(sys.modules.items()):
        if name != library and not name.startswith(f"{library}."):
            continue
        for key, value in list(vars(module).items()):
            found[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__ == name:
                found.update({f"{name}.{key}.{inner}": each for inner, each in vars(value).items()})
    return {
        name: value for name, value in found.items() if callable(value) or isinstance(value, (classmethod, property))
    }


def _values(model: nn.Module) -> dict[str, Tensor]:
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach().clone() for name, tensor in tensors}


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []
