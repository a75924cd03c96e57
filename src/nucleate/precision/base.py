"""What a precision is: the dtype parameters are made in, and what surrounds forward, backward and step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nucleate.deferred import Given
from nucleate.plugin import Plugin


class Precision(Plugin):
    """How numbers are kept and computed.

    Required: the contract's two methods and `dtype`. The rest defaults to doing nothing.

    `setup(model)` is plain torch code that also works while the model is deferred: it runs under the
    model's own recorder, so `parameter.data = parameter.data.to(dtype)` on a deferred parameter adds a
    cast to its recipe.
    """

    kind: ClassVar[str] = "precision"
    #: Whether `runtime.backward` must be used because the loss is scaled; `loss.backward()` is then refused.
    scales_gradients: bool = False

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of new floating point parameters."""

    @abstractmethod
    def module_init_context(self) -> AbstractContextManager[object]:
        """Return the context in which factories make floating point tensors of `dtype`."""

    @abstractmethod
    def setup(self, model: nn.Module) -> nn.Module:
        """Bring the parameters of `model` to this precision, in place."""

    def before_load(self, model: nn.Module, stored: Mapping[str, Given]) -> None:
        """Bring a model into the form of what is about to be loaded into it, before `setup`. Does nothing by default.

        Called before the two are compared, with the model's deferred tensors being recorded as in `setup`, so that a
        checkpoint of quantized layers meets quantized layers.

        Args:
            model: The model.
            stored: What the checkpoint holds for it: the names that the model may ask for, to the elements.

        Raises:
            CheckpointError: The checkpoint cannot be loaded with this precision.
        """

    def quantization_config(self, model: nn.Module) -> dict[str, Any] | None:
        """Return what a Hugging Face configuration calls `quantization_config`, for a model that is set up.

        Args:
            model: The model.

        Returns:
            None, as here, for a precision that does not quantize.
        """
        return None

    def forward_context(self) -> AbstractContextManager[object]:
        """Return the context that surrounds every forward call."""
        return nullcontext()

    def convert_input(self, data: Any) -> Any:
        """Convert floating point tensors on their way into forward."""
        return data

    def convert_output(self, data: Any) -> Any:
        """Convert floating point tensors on their way out of forward."""
        return data

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss that backward runs on."""
        return loss

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring the gradients of `optimizer` to their true size, once before each step; needed to clip them."""

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """Step `optimizer`, or skip the step where gradients overflowed."""
        return optimizer.step(closure) if closure is not None else optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, such as the gradient scale."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
