"""The dtypes of the model itself: nothing is cast. This is the precision of a `Runtime` that is given none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import final

import torch
from torch import nn

from nucleate.precision.base import Precision


@final
class NoCastPrecision(Precision):
    """A precision that casts nothing: `no-cast`, which `Runtime(precision=None)` takes.

    Parameters and buffers keep the dtypes that the constructor, or the user afterwards, gave them. Inputs and outputs
    of forward are passed on as they are. torch's default dtype stays as it is, so a constructor makes what it makes
    without nucleate.
    """

    name = "no-cast"
    keeps_dtypes = True

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of new floating point parameters: torch's default dtype at this moment."""
        return torch.get_default_dtype()

    def module_init_context(self) -> AbstractContextManager[object]:
        """Return a context without effect."""
        return nullcontext()

    def setup(self, model: nn.Module) -> nn.Module:
        """Return `model` as it is."""
        return model
