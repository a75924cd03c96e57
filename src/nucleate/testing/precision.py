"""The precision suite: tests for every precision, which a plugin's test class inherits."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from nucleate.accelerators.base import Accelerator
from nucleate.precision.base import Precision
from nucleate.precision.fixed_dtype import FixedDtype
from nucleate.runtime import Runtime
from nucleate.testing.models import MODELS, TinyConvNet, TinyModel, TinyOdd, TinyTransformer

each_model = pytest.mark.parametrize("model_class", MODELS, ids=lambda cls: cls.__name__)


class PrecisionSuite(ABC):
    """The suite of precisions. Inherit it, name the class `Test...`, and implement `make_precision`.

    Attributes:
        accelerator: The accelerator of the tests.
        updates: After 20 steps of SGD, the loss of a tiny model must be less than this factor times the first loss.
            None for a precision that cannot train, such as one for inference.
        cannot_run: Tiny models whose forward torch cannot run in this precision on this accelerator.
        quantizes: Whether the precision replaces layers by quantized ones (`nucleate.precision.FixedDtype`), whose
            weights are frozen.
    """

    accelerator: str | Accelerator = "cpu"
    updates: float | None = 0.9
    cannot_run: tuple[type[TinyModel], ...] = ()
    quantizes: bool = False
    # The suite freezes no layer before it sets a model up.
    pytestmark = pytest.mark.filterwarnings("ignore:precision .* freezes them:UserWarning")

    @abstractmethod
    def make_precision(self) -> Precision:
        """Return a new precision with the options to test."""

    @pytest.fixture
    def precision(self) -> Precision:
        """A new precision that a runtime has checked."""
        return self.make_runtime().precision

    @pytest.fixture
    def device(self) -> torch.device:
        """The device that the tests run on."""
        return self.make_runtime().device

    def make_runtime(self) -> Runtime:
        """Return a runtime on one device with a new precision."""
        return Runtime(
            accelerator=self.accelerator, strategy="single_device", devices=1, precision=self.make_precision()
        )

    def set_up(self, model: TinyModel, lr: float = 0.1) -> tuple[Runtime, Any, Any]:
        """Return a new runtime, the model after its setup, and an optimizer of the trained parameters."""
        runtime = self.make_runtime()
        if self.quantizes:
            wrapped = runtime.setup(model)
            trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
            return runtime, wrapped, runtime.setup_optimizers(torch.optim.SGD(trained, lr=lr))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return runtime, *runtime.setup(model, torch.optim.SGD(trained, lr=lr))

    # --- the contract

    def test_it_has_a_name_and_a_kind(self, precision: Precision) -> None:
        assert precision.name
        assert precision.kind == "precision"
        assert precision.dtype.is_floating_point

    def test_a_model_is_constructed_in_its_dtype(self, precision: Precision) -> None:
        with precision.module_init_context():
            model = nn.Linear(3, 2)
        assert {p.dtype for p in model.parameters()} == {precision.dtype}

    @pytest.mark.parametrize("context", ["module_init_context", "forward_context"])
    @pytest.mark.parametrize("raises", [False, True])
    def test_its_contexts_end_also_by_an_error(
        self, precision: Precision, device: torch.device, context: str, raises: bool
    ) -> None:
        before = _process_state(device)
        with pytest.raises(ZeroDivisionError) if raises else nullcontext(), getattr(precision, context)():
            if raises:
                raise ZeroDivisionError
        assert _process_state(device) == before

    def test_its_contexts_can_be_entered_twice(self, precision: Precision) -> None:
        for _ in range(2):
            with precision.module_init_context(), precision.forward_context():
                pass

    # --- setup

    @each_model
    def test_setup_keeps_parameters_the_same_objects(self, precision: Precision, model_class: type[TinyModel]) -> None:
        model = model_class()
        before = dict(model.named_parameters(remove_duplicate=False))
        flags = {name: parameter.requires_grad for name, parameter in before.items()}
        assert precision.setup(model) is model
        after = dict(model.named_parameters(remove_duplicate=False))
        fixed = _fixed(model)
        assert self.quantizes or not fixed
        assert [name for name in after if name not in fixed] == [name for name in before if name not in fixed]
        for name in fixed:
            assert not after[name].requires_grad, f"{name} is part of a quantized weight, which cannot train"
        for name, parameter in after.items():
            if name in fixed:
                continue
            assert parameter is before[name], f"{name} is another object: ties and optimizers lose it"
            assert parameter.dtype == precision.dtype, name
            assert parameter.requires_grad == flags[name], name

    def test_setup_casts_every_parameter_or_none(self, precision: Precision) -> None:
        other = torch.float32 if precision.dtype == torch.float64 else torch.float64
        model = TinyOdd().to(other)
        dtypes = {name: buffer.dtype for name, buffer in model.named_buffers()}
        precision.setup(model)
        expected = other if precision.keeps_dtypes else precision.dtype
        fixed = _fixed(model)
        assert {p.dtype for name, p in model.named_parameters() if name not in fixed} == {expected}
        assert {name: buffer.dtype for name, buffer in model.named_buffers() if name in dtypes} == dtypes
        data = {"x": [torch.ones(2, dtype=other)]}
        assert (precision.convert_input(data) is data) == precision.keeps_dtypes
        assert (precision.convert_output(data) is data) or not precision.keeps_dtypes

    def test_layers_that_train_beside_frozen_ones_are_left_alone(self, precision: Precision) -> None:
        model = TinyTransformer(width=128).to(precision.dtype)
        model.blocks[0].requires_grad_(False)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        precision.setup(model)
        after = dict(model.named_parameters())
        for name, parameter in trained.items():
            assert after.get(name) is parameter, f"{name} trains, but it was replaced"
            assert parameter.requires_grad, f"{name} trains, but it was frozen"
            assert parameter.dtype == precision.dtype, name
        assert bool(_fixed(model)) == self.quantizes

    def test_complex_numbers_are_never_cast(self, precision: Precision) -> None:
        model = nn.Module()
        # torch's gradient scaler has no kernel for complex gradients.
        trains = not precision.scales_gradients
        model.weight = nn.Parameter(torch.randn(2, 2, dtype=torch.complex64), requires_grad=trains)
        model.register_buffer("table", torch.randn(3, dtype=torch.complex128))
        parameter, value = model.weight, model.weight.detach().clone()
        precision.setup(model)
        assert model.weight is parameter
        assert torch.equal(parameter, value)
        assert parameter.dtype == torch.complex64
        assert parameter.requires_grad == trains
        assert model.table.dtype == torch.complex128
        for convert in (precision.convert_input, precision.convert_output):
            assert convert(parameter) is parameter

    def test_it_makes_weights_smaller_if_it_quantizes(self, precision: Precision) -> None:
        model = TinyTransformer(width=128).to(precision.dtype)
        before = sum(parameter.nbytes for parameter in model.blocks.parameters())
        precision.setup(model)
        after = sum(parameter.nbytes for parameter in model.blocks.parameters())
        assert after < 0.7 * before if self.quantizes else after == before

    @each_model
    def test_setup_keeps_the_values_of_buffers(self, precision: Precision, model_class: type[TinyModel]) -> None:
        model = model_class()
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        # The kernels of batch norm need the running statistics in the dtype of the weight.
        statistics = {
            f"{prefix}.{name}"
            for prefix, module in model.named_modules()
            if isinstance(module, _NormBase)
            for name, _ in module.named_buffers(recurse=False)
        }
        precision.setup(model)
        for name, buffer in model.named_buffers():
            # A quantized layer may have additional buffers.
            if name not in before and self.quantizes:
                continue
            if name not in statistics:
                assert buffer.dtype == before[name].dtype, f"{name} was rounded"
            assert torch.equal(buffer.to(before[name].dtype), before[name]), name

    def test_setup_twice_is_setup_once(self, precision: Precision) -> None:
        model = precision.setup(TinyOdd())
        values = [parameter.detach().clone() for parameter in model.parameters()]
        precision.setup(model)
        assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))

    # --- forward

    def test_collections_keep_their_form_and_what_is_not_floating_point(self, precision: Precision) -> None:
        data = {"floats": [torch.ones(2), (torch.zeros(1),)], "tokens": torch.tensor([1, 2]), "mask": True, "x": None}
        for convert in (precision.convert_input, precision.convert_output):
            converted = convert(data)
            assert list(converted) == list(data)
            assert isinstance(converted["floats"][1], tuple)
            assert torch.equal(converted["tokens"], torch.tensor([1, 2]))
            assert converted["tokens"].dtype == torch.int64
            assert converted["mask"] is True
            assert converted["x"] is None

    @each_model
    def test_forward_takes_and_gives_floats(self, device: torch.device, model_class: type[TinyModel]) -> None:
        if model_class in self.cannot_run:
            pytest.skip("torch cannot run it in this precision")
        runtime = self.make_runtime()
        with runtime.init_module(empty_init=False):
            model: Any = model_class()
        model = runtime.setup(model)
        output = model(model.sample().to(device))
        assert output.dtype in (torch.get_default_dtype(), runtime.precision.dtype)
        assert output.isfinite().all()

    # --- exactness

    @each_model
    def test_a_deferred_model_equals_a_real_one(self, model_class: type[TinyModel]) -> None:
        models = []
        for empty_init in (False, True):
            runtime = self.make_runtime()
            torch.manual_seed(1234)
            with runtime.init_module(empty_init=empty_init):
                model = model_class()
            wrapped = runtime.setup(model)
            models.append((wrapped, torch.rand(3)))
        (real, real_next), (made, made_next) = models
        assert torch.equal(real_next, made_next), "the random stream ends at another position"
        expected = dict((*real.named_parameters(), *real.named_buffers()))
        actual = dict((*made.named_parameters(), *made.named_buffers()))
        assert list(actual) == list(expected)
        for name, tensor in expected.items():
            assert actual[name].dtype == tensor.dtype, name
            assert torch.equal(actual[name], tensor), name

    # --- training

    @pytest.mark.parametrize("model_class", [TinyTransformer, TinyConvNet, TinyOdd], ids=lambda cls: cls.__name__)
    def test_it_trains(self, device: torch.device, model_class: type[TinyModel]) -> None:
        if self.updates is None:
            pytest.skip("this precision does not train")
        torch.manual_seed(0)
        with self.make_runtime().init_module(empty_init=False):
            model = model_class()
        runtime, model, optimizer = self.set_up(model)
        batch = model.sample(8).to(device)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = model.loss(model(batch))
            runtime.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < self.updates * losses[0], losses

    def test_gradients_are_unscaled_before_they_are_clipped(self, device: torch.device) -> None:
        if self.updates is None:
            pytest.skip("this precision does not train")
        torch.manual_seed(0)
        with self.make_runtime().init_module(empty_init=False):
            model = TinyOdd()
        runtime, model, optimizer = self.set_up(model)
        runtime.backward(model.loss(model(model.sample().to(device))))
        if self.quantizes:
            assert not runtime.precision.scales_gradients, "the gradients to compare with would have to be unscaled"
            gradients = [p.grad.float().clone() for p in model.parameters() if p.grad is not None]
        else:
            reference = TinyOdd().to(device)
            reference.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
            reference.loss(reference(reference.sample().to(device))).backward()
            gradients = [p.grad for p in reference.parameters() if p.grad is not None]
        norm = runtime.clip_gradients(model, optimizer, max_norm=1e-3)
        expected = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        assert norm is not None
        torch.testing.assert_close(norm.float().cpu(), expected.cpu(), rtol=0.05, atol=1e-3)
        clipped = [p.grad.float() for p in model.parameters() if p.grad is not None]
        assert torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in clipped])) < 1.1e-3

    def test_a_step_on_overflowed_gradients_is_skipped_where_gradients_are_scaled(self, device: torch.device) -> None:
        runtime = self.make_runtime()
        if not runtime.precision.scales_gradients:
            pytest.skip("this precision does not scale gradients")
        model: Any = TinyOdd()
        model, optimizer = runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        before = [p.detach().clone() for p in model.parameters()]
        runtime.backward(model.loss(model(model.sample().to(device))) * float("inf"))
        optimizer.step()
        assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))

    # --- state

    def test_its_state_survives_a_checkpoint(self, device: torch.device) -> None:
        runtime = self.make_runtime()
        if self.updates is not None:
            runtime, model, optimizer = self.set_up(TinyOdd())
            runtime.backward(model.loss(model(model.sample().to(device))))
            optimizer.step()
        state = runtime.precision.state_dict()
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        fresh = self.make_runtime().precision
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert _plain(fresh.state_dict()) == _plain(state)


def _fixed(model: nn.Module) -> set[str]:
    """Return the names of the parameters that are part of quantized weights."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, FixedDtype)
        for name in module.fixed_dtype
        if isinstance(module, nn.Module) and module._parameters.get(name) is not None
    }


def _process_state(device: torch.device) -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_autocast_enabled(device.type),
        torch.is_grad_enabled(),
    )


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in state.items()}
