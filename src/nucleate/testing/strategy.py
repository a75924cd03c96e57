"""The strategy suite: tests for every strategy, which a plugin's test class inherits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nucleate.accelerators.base import Accelerator
from nucleate.errors import NonFiniteGradientError, UsageError
from nucleate.layout import whole_of
from nucleate.runtime import Runtime
from nucleate.strategies.base import Strategy
from nucleate.testing.models import MODELS, TinyConvNet, TinyModel, TinyOdd, TinyTransformer

each_model = pytest.mark.parametrize("model_class", MODELS, ids=lambda cls: cls.__name__)

SEED = 1234


class StrategySuite(ABC):
    """The suite of strategies. Inherit it, name the class `Test...`, and implement `make_strategy`.

    Plain pytest runs the suite in one process. For several processes, run the same class under torchrun:

        torchrun --nproc-per-node 2 -m pytest -x tests/test_my_strategy.py

    Attributes:
        accelerator: The accelerator of the tests.
        rtol: The allowed relative difference of losses and gradient norms from those of a plain loop on the whole
            batch.
        skipped_models: Tiny models that this strategy cannot support.
    """

    accelerator: str | Accelerator = "cpu"
    rtol: float = 1e-5
    skipped_models: tuple[type[TinyModel], ...] = ()
    # Some tests give all ranks the same batch on purpose.
    pytestmark = pytest.mark.filterwarnings("ignore:all .* data parallel ranks gave:UserWarning")

    @abstractmethod
    def make_strategy(self) -> Strategy:
        """Return a new strategy with the options to test."""

    def make_runtime(self) -> Runtime:
        """Return a runtime over all processes with a new strategy."""
        return Runtime(accelerator=self.accelerator, strategy=self.make_strategy())

    @pytest.fixture
    def runtime(self) -> Runtime:
        """A launched runtime with a new strategy."""
        runtime = self.make_runtime()
        runtime.launch()
        return runtime

    @pytest.fixture(autouse=True)
    def _skip_models(self, request: pytest.FixtureRequest) -> None:
        callspec = getattr(request.node, "callspec", None)
        if callspec is not None and callspec.params.get("model_class") in self.skipped_models:
            pytest.skip("this strategy does not support this model")

    # --- the contract

    def test_it_has_a_name_and_a_kind(self, runtime: Runtime) -> None:
        assert runtime.strategy.name
        assert runtime.strategy.kind == "strategy"

    def test_it_knows_its_device_and_its_part_of_the_data(self, runtime: Runtime) -> None:
        strategy = runtime.strategy
        assert strategy.device == runtime.device
        assert 0 <= strategy.data_parallel_rank < strategy.data_parallel_size <= runtime.world_size

    def test_its_context_ends_also_by_an_error(self, runtime: Runtime) -> None:
        before = (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled())
        with pytest.raises(ZeroDivisionError), runtime.strategy.module_init_context():
            raise ZeroDivisionError
        assert (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()) == before

    # --- exactness: every rank has another seed, and still gets the values of an eager model with rank 0's seed

    @each_model
    @pytest.mark.parametrize("empty_init", [True, False, None])
    def test_a_model_equals_the_eager_one_bit_for_bit(
        self, runtime: Runtime, model_class: type[TinyModel], empty_init: bool | None
    ) -> None:
        expected, expected_next = self._eager(model_class)
        torch.manual_seed(SEED + runtime.global_rank)
        with runtime.init_module(empty_init=empty_init):
            model: nn.Module = model_class()
        model = runtime.setup(model)
        actual_next = torch.rand(3)
        assert torch.equal(actual_next, expected_next), "the random stream ends at another position than the eager one"
        values = _named_tensors(model)
        assert list(values) == list(expected)
        for name, value in expected.items():
            assert values[name].dtype == value.dtype, name
            assert torch.equal(values[name], value), name

    @each_model
    def test_ties_and_flags_are_kept(self, runtime: Runtime, model_class: type[TinyModel]) -> None:
        eager = model_class()
        model = self._model(runtime, model_class)
        assert _ties(model) == _ties(eager)
        flags = {name: p.requires_grad for name, p in eager.named_parameters()}
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags

    @each_model
    def test_nothing_is_left_without_memory(self, runtime: Runtime, model_class: type[TinyModel]) -> None:
        model = self._model(runtime, model_class)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            assert not tensor.is_meta, name

    def test_a_real_model_keeps_its_values(self, runtime: Runtime) -> None:
        model: nn.Module = TinyOdd()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.25)
        model = runtime.setup(model)
        values = _named_tensors(model)
        assert all((values[name] == 0.25).all() for name, _ in model.named_parameters())

    # --- the module that is returned

    @each_model
    def test_keys_of_the_state_have_no_prefix(self, runtime: Runtime, model_class: type[TinyModel]) -> None:
        assert list(self._model(runtime, model_class).state_dict()) == list(model_class().state_dict())

    def test_the_users_module_stays_at_hand(self, runtime: Runtime) -> None:
        with runtime.init_module(empty_init=True):
            model = TinyOdd()
        wrapped = runtime.setup(model)
        assert wrapped.module is model
        assert wrapped.train().training
        assert not wrapped.eval().training
        assert not model.training

    def test_setup_twice_is_refused(self, runtime: Runtime) -> None:
        model = self._model(runtime, TinyOdd)
        for again in (model, model.module):
            with pytest.raises(UsageError, match="already"):
                runtime.setup(again)

    # --- training

    @each_model
    @pytest.mark.parametrize("joint", [True, False], ids=["setup(model, optimizer)", "setup_optimizers"])
    def test_losses_follow_those_of_a_plain_loop(
        self, runtime: Runtime, model_class: type[TinyModel], joint: bool
    ) -> None:
        expected = self._plain_losses(runtime, model_class, torch.optim.Adam, num_steps=6)
        model, optimizer = self._trainable(runtime, model_class, torch.optim.Adam, joint=joint)
        actual = [self._step(runtime, model, optimizer, seed) for seed in range(6)]
        torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=self.rtol, atol=1e-6)

    def test_an_optimizer_that_setup_did_not_get_trains_the_model_or_fails_by_name(self, runtime: Runtime) -> None:
        with runtime.init_module(empty_init=True):
            model = TinyOdd()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wrapped = runtime.setup(model)
        before = _named_tensors(wrapped)
        runtime.backward(wrapped.loss(wrapped(self._batch(runtime, model, 0))))
        message = None
        try:
            optimizer.step()
        except UsageError as error:
            message = str(error)
        if message is not None:
            assert any(name in message for name, _ in wrapped.named_parameters())
            return
        after = _named_tensors(wrapped)
        trained = [name for name, parameter in wrapped.named_parameters() if parameter.grad is not None]
        assert trained
        assert not [name for name in trained if torch.equal(before[name], after[name])]

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_training_is_the_same_after_an_evaluation(
        self, runtime: Runtime, mode: Callable[[], AbstractContextManager[None]]
    ) -> None:
        expected = self._plain_losses(runtime, TinyTransformer, torch.optim.Adam, num_steps=3)
        model = self._model(runtime, TinyTransformer)
        with mode():
            model.eval()(self._batch(runtime, model.module, 0))
        # The parameters that are seen now must be those that train.
        optimizer = runtime.setup_optimizers(torch.optim.Adam(model.train().parameters(), lr=0.01))
        actual = [self._step(runtime, model, optimizer, seed) for seed in range(3)]
        torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=self.rtol, atol=1e-6)

    def test_a_model_without_a_forward_trains_by_its_parts(self, runtime: Runtime) -> None:
        def build() -> nn.ModuleDict:
            torch.manual_seed(SEED)
            return nn.ModuleDict({"first": TinyOdd(), "second": nn.Linear(7, 7)})

        with _factories_on(runtime.device):
            eager = build()
        with runtime.init_module(empty_init=True):
            model = build()
        wrapped = runtime.setup(model)
        first = TinyOdd()
        whole = self._whole_batch(runtime, first, 0)
        eager["second"](eager["first"](whole)).square().mean().backward()
        batch = self._batch(runtime, first, 0)
        runtime.backward(model["second"](model["first"](batch)).square().mean())
        for (name, parameter), other in zip(wrapped.named_parameters(), eager.parameters(), strict=True):
            assert parameter.grad is not None, name
            torch.testing.assert_close(_full(parameter.grad), other.grad, rtol=max(self.rtol, 1e-4), atol=1e-5)

    def test_gradients_accumulate_without_being_exchanged(self, runtime: Runtime) -> None:
        expected = self._plain_losses(runtime, TinyOdd, torch.optim.SGD, num_steps=2, repeats=2)
        model, optimizer = self._trainable(runtime, TinyOdd, torch.optim.SGD)
        actual = []
        for seed in range(2):
            optimizer.zero_grad()
            batch = self._batch(runtime, model.module, seed)
            for is_accumulating in (True, False):
                with runtime.no_backward_sync(model, enabled=is_accumulating):
                    loss = model.loss(model(batch))
                    runtime.backward(loss)
            optimizer.step()
            actual.append(runtime.all_reduce(loss.detach()).item())
        torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=self.rtol, atol=1e-6)

    @pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
    @pytest.mark.parametrize("make", [TinyTransformer, TinyOdd])
    def test_gradients_are_clipped_by_their_norm_over_all_ranks(
        self, runtime: Runtime, make: type[TinyModel], norm_type: float
    ) -> None:
        torch.manual_seed(SEED)
        with _factories_on(runtime.device):
            eager = make()
        eager.loss(eager(self._whole_batch(runtime, eager, 0))).backward()
        expected = torch.nn.utils.clip_grad_norm_(eager.parameters(), 1e-3, norm_type)
        model, optimizer = self._trainable(runtime, make, torch.optim.SGD)
        runtime.backward(model.loss(model(self._whole_batch(runtime, model.module, 0))))
        norm = runtime.clip_gradients(model, optimizer, max_norm=1e-3, norm_type=norm_type)
        assert norm is not None
        torch.testing.assert_close(_full(norm).cpu(), expected.cpu(), rtol=max(self.rtol, 1e-4), atol=1e-6)
        again = runtime.clip_gradients(model, optimizer, max_norm=1.0, norm_type=norm_type)
        assert again is not None
        assert _full(again).item() <= 1.01e-3

    def test_gradients_are_clipped_by_value(self, runtime: Runtime) -> None:
        model, optimizer = self._trainable(runtime, TinyOdd, torch.optim.SGD)
        runtime.backward(model.loss(model(self._batch(runtime, model.module, 0))) * 1e3)
        assert runtime.clip_gradients(model, optimizer, clip_val=1e-3) is None
        assert all(_full(p.grad).abs().max() <= 1e-3 for p in model.parameters() if p.grad is not None)

    def test_a_norm_that_is_not_finite_is_refused_before_gradients_change(self, runtime: Runtime) -> None:
        model, optimizer = self._trainable(runtime, TinyOdd, torch.optim.SGD)
        runtime.backward(model.loss(model(self._batch(runtime, model.module, 0))) * float("inf"))
        before = [_full(p.grad).clone() for p in model.parameters()]
        with pytest.raises(NonFiniteGradientError):
            runtime.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=True)
        for parameter, gradient in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(_full(parameter.grad), gradient, rtol=0, atol=0, equal_nan=True)

    # --- checkpoints

    @pytest.mark.parametrize("model_class", [TinyTransformer, TinyConvNet], ids=lambda cls: cls.__name__)
    def test_a_resumed_run_goes_on_exactly(
        self, runtime: Runtime, model_class: type[TinyModel], tmp_path: Path
    ) -> None:
        # Every rank of a test has its own temporary folder, but the ranks write one checkpoint in one folder.
        folder = Path(runtime.broadcast(str(tmp_path))) / "checkpoint"
        model, optimizer = self._trainable(runtime, model_class, torch.optim.AdamW)
        for seed in range(2):
            self._step(runtime, model, optimizer, seed)
        runtime.save(folder, {"model": model, "optimizer": optimizer, "step": 2})
        expected = [self._step(runtime, model, optimizer, seed) for seed in range(2, 5)]

        fresh = self.make_runtime()
        torch.manual_seed(SEED + 99)
        resumed, optimizer = self._trainable(fresh, model_class, torch.optim.AdamW, seed=SEED + 99)
        state = {"model": resumed, "optimizer": optimizer, "step": 0}
        fresh.load(folder, state)
        assert state["step"] == 2
        assert [self._step(fresh, resumed, optimizer, seed) for seed in range(2, 5)] == expected

    # --- helpers of the tests

    def _model(self, runtime: Runtime, model_class: type[TinyModel], seed: int = SEED) -> Any:
        torch.manual_seed(seed)
        with runtime.init_module(empty_init=True):
            model = model_class()
        return runtime.setup(model)

    def _trainable(
        self,
        runtime: Runtime,
        model_class: type[TinyModel],
        optimizer_class: Callable[..., torch.optim.Optimizer],
        joint: bool = True,
        seed: int = SEED,
    ) -> tuple[Any, Any]:
        """Return a model and its optimizer. With `joint`, the optimizer is built on deferred parameters."""
        if not joint:
            model = self._model(runtime, model_class, seed)
            optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=0.01)
            return model, runtime.setup_optimizers(optimizer)
        torch.manual_seed(seed)
        with runtime.init_module(empty_init=True):
            model = model_class()
        optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model, optimizer = runtime.setup(model, optimizer)
        return model, optimizer

    def _step(self, runtime: Runtime, model: Any, optimizer: Any, seed: int) -> float:
        """Train one step and return the loss of the whole batch."""
        optimizer.zero_grad()
        loss = model.loss(model(self._batch(runtime, model.module, seed)))
        runtime.backward(loss)
        optimizer.step()
        mean: float = runtime.all_reduce(loss.detach()).item()
        return mean

    def _eager(self, model_class: type[TinyModel]) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(SEED)
        with _factories_on(self.make_runtime().device):
            model = model_class()
        return _named_tensors(model), torch.rand(3)

    def _plain_losses(
        self,
        runtime: Runtime,
        model_class: type[TinyModel],
        optimizer_class: Callable[..., torch.optim.Optimizer],
        num_steps: int,
        repeats: int = 1,
    ) -> list[float]:
        """Train a model on the whole batch without nucleate."""
        torch.manual_seed(SEED)
        with _factories_on(runtime.device):
            model = model_class()
        optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=0.01)
        losses = []
        for seed in range(num_steps):
            optimizer.zero_grad()
            for _ in range(repeats):
                loss = model.loss(model(self._whole_batch(runtime, model, seed)))
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def _whole_batch(self, runtime: Runtime, model: TinyModel, seed: int) -> Tensor:
        return model.sample(4 * runtime.strategy.data_parallel_size, seed).to(runtime.device)

    def _batch(self, runtime: Runtime, model: TinyModel, seed: int) -> Tensor:
        """Return this rank's part of the batch, or the whole batch if samples depend on each other."""
        whole = self._whole_batch(runtime, model, seed)
        if not model.per_sample:
            return whole
        return whole[runtime.strategy.data_parallel_rank :: runtime.strategy.data_parallel_size]


def _factories_on(device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which eager code makes tensors on a device."""
    return nullcontext() if device.type == "cpu" else device


def _full(tensor: Tensor) -> Tensor:
    """Return the whole tensor of a tensor that may be sharded. Every rank must call it."""
    return whole_of(tensor).detach()


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: _full(tensor).clone() for name, tensor in named}


def _ties(model: nn.Module) -> list[list[str]]:
    """Return the list of names of each parameter object."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return list(groups.values())
