"""A mark for modules with parameters that no precision may cast, because their dtype is part of their meaning."""

from __future__ import annotations

from typing import ClassVar


class FixedDtype:
    """A second base class, beside `torch.nn.Module`, for a module whose parameters have a special format.

    For example, a quantized layer's scales are floating point numbers, and casting them would change every weight.
    """

    #: The names of the parameters that are not cast.
    fixed_dtype: ClassVar[tuple[str, ...]] = ()
