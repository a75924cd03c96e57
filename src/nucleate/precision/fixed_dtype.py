"""Modules with parameters that no precision casts, because their dtype is part of what they mean."""

from __future__ import annotations

from typing import ClassVar


class FixedDtype:
    """A base beside `torch.nn.Module` for a module with parameters in a format of their own.

    A quantized layer's scales are floating point numbers, and casting them would change every weight.
    """

    #: The names of these parameters.
    fixed_dtype: ClassVar[tuple[str, ...]] = ()
