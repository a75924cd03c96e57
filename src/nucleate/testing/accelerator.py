"""The accelerator suite: tests for every accelerator, which a plugin's test class inherits."""

from __future__ import annotations

from abc import ABC, abstractmethod

import pytest
import torch
from torch import nn

from nucleate.accelerators.base import Accelerator
from nucleate.deferred import deferred, handle_of
from nucleate.errors import ConfigurationError
from nucleate.testing.models import MODELS, TinyModel, TinyTransformer


class AcceleratorSuite(ABC):
    """The suite of accelerators. Inherit it, name the class `Test...`, and implement `make_accelerator`.

    On a machine without such a device, only the tests about its absence run.
    """

    @abstractmethod
    def make_accelerator(self) -> Accelerator:
        """Return a new accelerator with the options to test."""

    @pytest.fixture
    def accelerator(self) -> Accelerator:
        """A new accelerator."""
        return self.make_accelerator()

    @pytest.fixture
    def device(self, accelerator: Accelerator) -> torch.device:
        """The device of this process."""
        if not accelerator.is_available():
            pytest.skip(f"no {accelerator.name} device here")
        return accelerator.select(0)

    def test_it_has_a_name_and_a_kind(self, accelerator: Accelerator) -> None:
        assert accelerator.name
        assert accelerator.kind == "accelerator"

    def test_being_absent_is_an_answer_and_not_an_error(self, accelerator: Accelerator) -> None:
        if accelerator.is_available() is False:
            assert accelerator.why_absent()
            assert accelerator.count() == 0
            with pytest.raises(ConfigurationError):
                accelerator.select(0)
        else:
            assert accelerator.is_available() is True
            assert accelerator.count() >= 1

    def test_its_backend_can_be_used(self, accelerator: Accelerator, device: torch.device) -> None:
        if torch.distributed.is_available():
            # The backend is one name for all devices, or a list such as "cpu:gloo,xpu:xccl".
            for part in accelerator.backend.split(","):
                assert torch.distributed.is_backend_available(part.rpartition(":")[2])

    def test_selecting_twice_gives_the_same_device(self, accelerator: Accelerator, device: torch.device) -> None:
        assert accelerator.select(0) == device
        assert torch.empty(1, device=device).device == device

    def test_factories_place_tensors_on_the_device(self, accelerator: Accelerator, device: torch.device) -> None:
        with accelerator.module_init_context():
            model = nn.Linear(3, 2)
            tensor = torch.arange(3)
        assert {model.weight.device, model.bias.device, tensor.device} == {device}

    def test_its_context_ends_also_by_an_error(self, accelerator: Accelerator, device: torch.device) -> None:
        before = torch.get_default_device()
        with pytest.raises(RuntimeError, match="inside"), accelerator.module_init_context():
            raise RuntimeError("inside")
        assert torch.get_default_device() == before

    @pytest.mark.parametrize("model_class", MODELS, ids=lambda cls: cls.__name__)
    def test_setup_moves_everything_and_changes_nothing(
        self, accelerator: Accelerator, device: torch.device, model_class: type[TinyModel]
    ) -> None:
        torch.manual_seed(0)
        model = model_class()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        values = {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
        assert accelerator.setup(model) is model
        moved = dict(model.named_parameters(remove_duplicate=False))
        assert all(moved[name] is parameter for name, parameter in parameters.items())
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            assert tensor.device == device, name
            assert torch.equal(tensor.cpu(), values[name]), name
        assert model(model.sample().to(device)).device == device

    def test_setup_leaves_deferred_tensors_alone(self, accelerator: Accelerator, device: torch.device) -> None:
        with accelerator.module_init_context(), deferred(device):
            model = TinyTransformer()
        accelerator.setup(model)
        assert all(handle_of(tensor) is not None for tensor in (*model.parameters(), *model.buffers()))

    def test_its_random_state_can_be_restored(self, accelerator: Accelerator, device: torch.device) -> None:
        state = accelerator.random_state()
        if state is None:
            assert device.type == "cpu", "a device with its own generator must return the generator's state"
            return
        first = torch.rand(5, device=device)
        accelerator.set_random_state(state)
        assert torch.equal(torch.rand(5, device=device), first)

    def test_its_hooks_know_the_devices_generator(self, accelerator: Accelerator, device: torch.device) -> None:
        state = accelerator.random_state()
        if state is not None:
            assert torch.equal(accelerator.default_generator(device).get_state(), state)
            torch.rand(5, device=device)
            assert not torch.equal(accelerator.default_generator(device).get_state(), state)

    def test_what_it_says_of_pinned_memory_is_true(self, accelerator: Accelerator, device: torch.device) -> None:
        if accelerator.pins_memory:
            tensor = torch.arange(5, pin_memory=True)
            assert torch.equal(tensor.to(device, non_blocking=True).cpu(), tensor)

    def test_it_counts_the_memory_of_its_device_or_says_that_it_cannot(
        self, accelerator: Accelerator, device: torch.device
    ) -> None:
        tensor = torch.ones(2**18, device=device)
        peak = accelerator.peak_memory_bytes()
        assert peak is None or peak >= tensor.nbytes
