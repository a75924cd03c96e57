"""Parameters and computation in one full dtype: `32-true` and `64-true`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self, final

import torch
from torch import nn

from nucleate.errors import ConfigurationError
from nucleate.precision.base import Precision
from nucleate.precision.casting import cast_parameters, convert, default_dtype

_NAMES = {"32-true": torch.float32, "64-true": torch.float64}


@final
class FullPrecision(Precision):
    """A precision that keeps and computes everything in float32 or float64.

    Inputs of forward are cast to the dtype; outputs keep it.

    Args:
        dtype: `torch.float32` or `torch.float64`.

    Raises:
        ConfigurationError: `dtype` is another dtype.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in _NAMES.values():
            raise ConfigurationError(
                f"FullPrecision takes torch.float32 or torch.float64, not {dtype}; HalfPrecision takes half dtypes."
            )
        self._dtype = dtype
        self.name = next(name for name, known in _NAMES.items() if known == dtype)

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Build `"32-true"` or `"64-true"`."""
        if name not in _NAMES:
            raise ConfigurationError(f"FullPrecision has no variant {name!r}; it has {' and '.join(_NAMES)}.")
        return cls(_NAMES[name])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters and computation."""
        return self._dtype

    def module_init_context(self) -> AbstractContextManager[object]:
        """Return the context in which factories make floating point tensors of this dtype."""
        return default_dtype(self._dtype)

    def setup(self, model: nn.Module) -> nn.Module:
        """Cast the floating point parameters of `model`, in place."""
        return cast_parameters(model, self._dtype)

    def forward_context(self) -> AbstractContextManager[object]:
        """Return the context that surrounds forward; in a float64 model, new tensors are float64 too."""
        return default_dtype(self._dtype) if self._dtype == torch.float64 else nullcontext()

    def convert_input(self, data: Any) -> Any:
        """Cast floating point tensors to this dtype."""
        return convert(data, self._dtype)
