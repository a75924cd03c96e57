"""Parameters and computation in a half dtype: `bf16-true` and `16-true`. Buffers keep their original dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Self, final

import torch
from torch import nn

from nucleate.devices import hooks_of
from nucleate.errors import ConfigurationError
from nucleate.plugin import Composition
from nucleate.precision.base import Precision
from nucleate.precision.casting import cast_parameters, convert, default_dtype

_NAMES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


@final
class HalfPrecision(Precision):
    """A precision that keeps and computes everything in bfloat16 or float16, without scaling.

    Inputs of forward are cast to the dtype, and outputs back to the default dtype, so that the loss is computed in full
    precision. Forward itself runs under the caller's default dtype: a position or frequency table made there is not
    rounded. If forward makes a tensor to combine it with a parameter, it must pass `dtype=x.dtype`.

    Args:
        dtype: `torch.bfloat16` or `torch.float16`.

    Raises:
        ConfigurationError: `dtype` is another dtype.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        if dtype not in _NAMES.values():
            raise ConfigurationError(
                f"HalfPrecision takes torch.bfloat16 or torch.float16, not {dtype}; FullPrecision takes full dtypes."
            )
        self._dtype = dtype
        self.name = next(name for name, known in _NAMES.items() if known == dtype)

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Build `"bf16-true"` or `"16-true"`."""
        if name not in _NAMES:
            raise ConfigurationError(f"HalfPrecision has no variant {name!r}; it has {' and '.join(_NAMES)}.")
        return cls(_NAMES[name])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters and computation."""
        return self._dtype

    def check(self, composition: Composition) -> None:
        """Refuse bfloat16 on a device that does not support it."""
        refuse_missing_bfloat16(self, self._dtype, composition.device)

    def module_init_context(self) -> AbstractContextManager[object]:
        """Return the context in which factories make floating point tensors of this dtype."""
        return default_dtype(self._dtype)

    def setup(self, model: nn.Module) -> nn.Module:
        """Cast the floating point parameters of `model`, in place; buffers keep their dtype."""
        return cast_parameters(model, self._dtype)

    def convert_input(self, data: Any) -> Any:
        """Cast floating point tensors to this dtype."""
        return convert(data, self._dtype)

    def convert_output(self, data: Any) -> Any:
        """Cast floating point tensors to the default dtype."""
        return convert(data, torch.get_default_dtype())


def refuse_missing_bfloat16(precision: Precision, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ConfigurationError if `dtype` is bfloat16 and the device does not support it."""
    if dtype != torch.bfloat16:
        return
    hooks = hooks_of(device)
    if not hooks.supports_bfloat16(device):
        raise ConfigurationError(
            f"precision {precision.name!r} needs bfloat16, which {hooks.describe(device)} does not have. "
            "Use '16-mixed' or '32-true'."
        )
