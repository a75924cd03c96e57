"""The comparison of a strategy with eager torch: the runtimes, models, batches and plain loops of the suites."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nucleate.accelerators.base import Accelerator
from nucleate.layout import is_partial, reduced_gradient, whole_of
from nucleate.runtime import Runtime
from nucleate.strategies.base import Strategy
from nucleate.testing.models import MODELS, TinyConvNet, TinyModel, TinyOdd, TinyTransformer

SEED = 1234

#: The models of an argument of a test, if the suite has them; else its first model.
_PREFERRED: dict[str, tuple[type[TinyModel], ...]] = {
    "small_class": (TinyOdd,),
    "deep_class": (TinyTransformer,),
    "clipped_class": (TinyTransformer, TinyOdd),
    "resumed_class": (TinyTransformer, TinyConvNet),
}


class BesideEager(ABC):
    """The base of the suites that compare with eager torch; see `StrategySuite` for the attributes."""

    accelerator: str | Accelerator = "cpu"
    rtol: float = 1e-5
    models: tuple[type[TinyModel], ...] = MODELS
    skipped_models: tuple[type[TinyModel], ...] = ()
    splits: bool | None = None
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

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Give each test the models of this suite. pytest calls this method."""
        fitting = [model for model in self.models if model not in self.skipped_models]
        for argument in ("model_class", *_PREFERRED):
            if argument in metafunc.fixturenames:
                chosen = [model for model in _PREFERRED.get(argument, fitting) if model in fitting] or fitting[:1]
                metafunc.parametrize(argument, chosen, ids=[model.__name__ for model in chosen])

    # --- models of the strategy

    def _model(self, runtime: Runtime, model_class: Callable[[], nn.Module], seed: int = SEED) -> Any:
        torch.manual_seed(seed)
        with runtime.init_module(empty_init=True):
            model = model_class()
        return runtime.setup(model)

    def _trainable(
        self,
        runtime: Runtime,
        model_class: Callable[[], nn.Module],
        optimizer_class: Callable[..., torch.optim.Optimizer],
        joint: bool = True,
        seed: int = SEED,
    ) -> tuple[Any, Any]:
        """Return a model and its optimizer. With `joint`, the optimizer is built on deferred parameters."""
        if not joint:
            model = self._model(runtime, model_class, seed)
            return model, runtime.setup_optimizers(_optimizer_of(model, optimizer_class))
        torch.manual_seed(seed)
        with runtime.init_module(empty_init=True):
            model = model_class()
        model, optimizer = runtime.setup(model, _optimizer_of(model, optimizer_class))
        return model, optimizer

    def _step(self, runtime: Runtime, model: Any, optimizer: Any, seed: int) -> float:
        """Train one step and return the loss of the whole batch."""
        optimizer.zero_grad()
        loss = model.loss(model(self._batch(runtime, model.module, seed)))
        runtime.backward(loss)
        optimizer.step()
        mean: float = runtime.all_reduce(loss.detach()).item()
        return mean

    def _splits(self, runtime: Runtime) -> bool:
        """Return whether the strategy must split tensors over these ranks."""
        if runtime.world_size == 1:
            return False
        return runtime.strategy.shards if self.splits is None else self.splits

    # --- the same without nucleate

    def _plain(self, runtime: Runtime, model_class: Callable[[], Any], seed: int = SEED) -> Any:
        """Return an eager model on the device."""
        torch.manual_seed(seed)
        with factories_on(runtime.device):
            return model_class()

    def _eager(self, model_class: Callable[[], nn.Module]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the tensors of an eager model, and the random numbers that follow."""
        model = self._plain(self.make_runtime(), model_class)
        return named_tensors(model), torch.rand(3)

    def _plain_losses(
        self,
        runtime: Runtime,
        model_class: Callable[[], Any],
        optimizer_class: Callable[..., torch.optim.Optimizer],
        num_steps: int,
        repeats: int = 1,
    ) -> list[float]:
        """Train a model on the whole batch without nucleate."""
        model = self._plain(runtime, model_class)
        optimizer = _optimizer_of(model, optimizer_class)
        return [self._plain_step(runtime, model, optimizer, seed, repeats) for seed in range(num_steps)]

    def _plain_step(self, runtime: Runtime, model: Any, optimizer: Any, seed: int, repeats: int = 1) -> float:
        optimizer.zero_grad()
        for _ in range(repeats):
            loss = model.loss(model(self._whole_batch(runtime, model, seed)))
            loss.backward()
        optimizer.step()
        value: float = loss.item()
        return value

    def _whole_batch(self, runtime: Runtime, model: TinyModel, seed: int) -> Tensor:
        return model.sample(4 * runtime.strategy.data_parallel_size, seed).to(runtime.device)

    def _batch(self, runtime: Runtime, model: TinyModel, seed: int) -> Tensor:
        """Return this rank's part of the batch, or the whole batch if samples depend on each other."""
        whole = self._whole_batch(runtime, model, seed)
        if not model.per_sample:
            return whole
        return whole[runtime.strategy.data_parallel_rank :: runtime.strategy.data_parallel_size]

    # --- comparisons

    def _compare_losses(self, actual: Iterable[float], expected: Iterable[float]) -> None:
        torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=self.rtol, atol=1e-6)

    def _compare_gradients(self, model: nn.Module, plain: nn.Module, rtol: float = 1e-4) -> None:
        """Compare the gradient of each parameter with that of the plain model. Every rank must call it."""
        rtol = max(self.rtol, rtol)
        for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None), name
            if other.grad is None:
                continue
            atol = max(1e-5, rtol * other.grad.abs().max().item())
            gradient = reduced_gradient(parameter) if is_partial(parameter.grad) else parameter.grad
            difference = (full(gradient) - other.grad).abs()
            allowed = atol + rtol * other.grad.abs()
            assert (difference <= allowed).all(), f"the gradient of {name} differs by {difference.max().item()}"


def factories_on(device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which eager code makes tensors on a device."""
    return nullcontext() if device.type == "cpu" else device


def full(tensor: Any) -> Tensor:
    """Return the whole tensor of a tensor that may be sharded. Every rank must call it."""
    return whole_of(tensor).detach()


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole values of all parameters and buffers. Every rank must call it."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: full(tensor).clone() for name, tensor in named}


def ties_of(model: nn.Module) -> list[list[str]]:
    """Return the list of names of each parameter object."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return list(groups.values())


def _optimizer_of(model: nn.Module, make: Callable[..., torch.optim.Optimizer]) -> torch.optim.Optimizer:
    return make([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
