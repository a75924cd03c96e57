"""The base class of precisions: the dtype of new parameters, and hooks around forward, backward and step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nucleate.deferred import ElementSource
from nucleate.plugin import Plugin
from nucleate.precision.mismatch import explain_mismatch


class Precision(Plugin):
    """A plugin that decides how numbers are kept and computed.

    Required: the contract's two methods and `dtype`. By default, all other methods do nothing.

    `setup(model)` is plain torch code that also works while the model is deferred: it runs under the model's own
    recording, so `parameter.data = parameter.data.to(dtype)` on a deferred parameter adds a cast to its recipe.
    """

    kind: ClassVar[str] = "precision"
    #: Whether parameters, inputs and outputs stay as they are. Code that makes models may then choose their dtypes.
    keeps_dtypes: bool = False
    #: Whether the user must call `runtime.backward` because the loss is scaled; `loss.backward()` is then refused.
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

    def before_load(self, model: nn.Module, stored: Mapping[str, ElementSource]) -> None:
        """Change a model to the form of the checkpoint that is loaded before `setup`. Does nothing by default.

        The call comes before the checkpoint is compared with the model, so that a checkpoint of quantized layers meets
        quantized layers. Changes to the model's deferred tensors are recorded, as in `setup`.

        Args:
            model: The model.
            stored: The checkpoint's element sources for the model, by the names that the model may ask for.

        Raises:
            CheckpointError: The checkpoint cannot be loaded with this precision.
        """

    def quantization_config(self, model: nn.Module) -> dict[str, Any] | None:
        """Return the `quantization_config` of a Hugging Face configuration, for a model that is set up.

        Args:
            model: The model.

        Returns:
            The content of `quantization_config`; None, the default, for a precision that does not quantize.
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

    def explain(self, error: Exception, model: nn.Module) -> Exception | None:
        """Return a more helpful error for one that forward raised.

        By default, a dtype mismatch is explained by the buffers of another dtype, which the precision does not cast.

        Args:
            error: The error that forward raised.
            model: The model.

        Returns:
            The error to raise from `error`. None raises `error` itself.
        """
        return None if self.keeps_dtypes else explain_mismatch(error, model, self.name, (self.dtype,))

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss for backward."""
        return loss

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring the gradients of `optimizer` to their true size, once before each step; clipping needs this."""

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """Step `optimizer`, or skip the step if gradients overflowed."""
        return optimizer.step(closure) if closure is not None else optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, such as the gradient scale."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
