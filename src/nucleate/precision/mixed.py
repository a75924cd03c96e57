"""Parameters in float32, computation under autocast: `bf16-mixed`, and `16-mixed` with a gradient scaler."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nucleate.errors import ConfigurationError, UsageError, name_list
from nucleate.plugin import Composition
from nucleate.precision.base import Precision
from nucleate.precision.casting import cast_parameters, convert, default_dtype
from nucleate.precision.half import refuse_missing_bfloat16
from nucleate.precision.mismatch import explain_mismatch

_NAMES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@final
class MixedPrecision(Precision):
    """A precision that keeps parameters in float32 and lets autocast compute in a half dtype.

    float16 has a small range. So its loss is scaled up before backward, and its gradients are scaled down before the
    step. If gradients overflowed, the step is skipped and the scale is lowered. The scale changes only when the next
    backward begins: all optimizers that step after the same backward use that backward's scale.

    Args:
        dtype: `torch.bfloat16` or `torch.float16`.
        device_type: The kind of device for autocast; None follows the device of the runtime.
        scaler: A gradient scaler with other settings than torch's defaults. float16 has a scaler by default.

    Raises:
        ConfigurationError: `dtype` is another dtype, or bfloat16 is combined with a scaler.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.bfloat16,
        device_type: str | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if dtype not in _NAMES.values():
            raise ConfigurationError(f"MixedPrecision takes torch.bfloat16 or torch.float16, not {dtype}.")
        if scaler is not None and dtype != torch.float16:
            raise ConfigurationError("bfloat16 has the range of float32: leave the scaler out, or use torch.float16.")
        self.name = next(name for name, known in _NAMES.items() if known == dtype)
        self.compute_dtype = dtype
        self._device_type = device_type
        self._followed = "cpu"
        self._scaler = scaler
        self.scales_gradients = dtype == torch.float16
        # The number of backward passes so far; and for each optimizer with unscaled gradients, that number at the
        # time of the unscaling.
        self._backwards = 0
        self._unscaled: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._stepped = False

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Build `"bf16-mixed"` or `"16-mixed"`."""
        if name not in _NAMES:
            raise ConfigurationError(f"MixedPrecision has no variant {name!r}; it has {' and '.join(_NAMES)}.")
        return cls(_NAMES[name])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters: float32."""
        return torch.float32

    @property
    def device_type(self) -> str:
        """The kind of device for autocast."""
        return self._device_type or self._followed

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler of float16, which is made at the first use; None for bfloat16."""
        if self._scaler is None and self.scales_gradients:
            self._scaler = torch.amp.GradScaler(self.device_type)
        return self._scaler

    def check(self, composition: Composition) -> None:
        """Store the device; refuse a device without autocast, or another device than the requested one."""
        device = composition.device
        if self._device_type not in (None, device.type):
            raise ConfigurationError(
                f"MixedPrecision(device_type={self._device_type!r}) on a {device.type!r} device would compute in "
                "float32. Leave device_type out, and it follows the device."
            )
        if not torch.amp.is_autocast_available(device.type):
            raise ConfigurationError(f"torch has no autocast for {device.type!r}; use a precision that ends in -true.")
        refuse_missing_bfloat16(self, self.compute_dtype, device)
        self._followed = device.type

    def module_init_context(self) -> AbstractContextManager[object]:
        """Return the context in which factories make float32 tensors."""
        return default_dtype(torch.float32)

    def setup(self, model: nn.Module) -> nn.Module:
        """Cast the floating point parameters of `model` to float32, in place.

        Raises:
            ConfigurationError: The precision scales gradients, and complex parameters train. torch's scaler has no
                kernel for complex gradients.
        """
        if self.scales_gradients:
            named = model.named_parameters()
            complex_ones = [fqn for fqn, parameter in named if parameter.requires_grad and parameter.is_complex()]
            if complex_ones:
                raise ConfigurationError(
                    f"precision {self.name!r} scales gradients, which torch cannot do with complex ones: "
                    f"{name_list(complex_ones)}. Use 'bf16-mixed' or '32-true', or freeze these parameters."
                )
        return cast_parameters(model, torch.float32)

    def forward_context(self) -> AbstractContextManager[object]:
        """Return the context of autocast to the half dtype."""
        return torch.autocast(self.device_type, dtype=self.compute_dtype)

    def convert_input(self, data: Any) -> Any:
        """Cast floating point tensors to float32."""
        return convert(data, torch.float32)

    def convert_output(self, data: Any) -> Any:
        """Cast floating point tensors to the default dtype."""
        return convert(data, torch.get_default_dtype())

    def explain(self, error: Exception, model: nn.Module) -> Exception | None:
        """Explain a mismatch by buffers that autocast does not cast, such as float64 tables."""
        return explain_mismatch(error, model, self.name, (torch.float32, self.compute_dtype))

    def scale(self, loss: Tensor) -> Tensor:
        """Update the scale from the steps since the last backward, and return the loss times the scale."""
        if self.scaler is None:
            return loss
        if self._stepped and not self._unscaled:
            self.scaler.update()
            self._stepped = False
        self._backwards += 1
        return self.scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients of `optimizer` by the scale, unless this was done since the last backward.

        Raises:
            UsageError: No scaled backward has run, or another backward has run since the gradients were unscaled.
        """
        if self.scaler is None:
            return
        if optimizer in self._unscaled:
            if self._unscaled[optimizer] != self._backwards:
                raise UsageError(
                    "the gradients of this optimizer were unscaled, as clip_gradients does, and then another backward "
                    "ran, so they mix two scales. Call optimizer.step() after clip_gradients and before the next "
                    "backward. The step skips itself if gradients overflowed."
                )
            return
        if self._backwards == 0:
            raise UsageError(
                f"precision {self.name!r} scales gradients, but no loss went through runtime.backward(loss) yet. Call "
                "runtime.backward(loss) instead of loss.backward()."
            )
        self.scaler.unscale_(optimizer)
        self._unscaled[optimizer] = self._backwards

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """Step `optimizer` on the unscaled gradients, or skip the step if they overflowed.

        The decision to skip is the same on every rank: equal gradients overflow alike, and for shards torch reduces the
        decision over the mesh (`found_inf_reduce_handler`, torch/distributed/tensor/_dispatch.py, 2.13).

        Raises:
            UsageError: There is a closure, which would run backward inside the step.
        """
        if self.scaler is None:
            return super().step(optimizer, closure)
        if closure is not None:
            raise UsageError(
                f"optimizer.step(closure) does not work with precision {self.name!r}: the closure's gradients would be "
                "scaled. Use 'bf16-mixed' or '32-true' for optimizers that need a closure."
            )
        if all(parameter.grad is None for group in optimizer.param_groups for parameter in group["params"]):
            return optimizer.step()
        # Fused optimizers could unscale inside their kernel, but one way for all optimizers is simpler to get right.
        self.unscale(optimizer)
        result = self.scaler.step(optimizer)
        del self._unscaled[optimizer]
        self._stepped = True
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and its history."""
        if self.scaler is None:
            return {}
        if self._stepped and not self._unscaled:
            self.scaler.update()
            self._stepped = False
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scale and its history."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the record of unscaled gradients, because a pickle does not contain gradients."""
        scaler = None if self._scaler is None else self._scaler.state_dict()
        return {**self.__dict__, "_scaler": None, "_unscaled": None, "_stepped": False, "_scaler_state": scaler}

    def __setstate__(self, state: dict[str, Any]) -> None:
        scaler = state.pop("_scaler_state")
        self.__dict__.update(state)
        self._unscaled = WeakKeyDictionary()
        if scaler is not None:
            self.load_state_dict(scaler)
