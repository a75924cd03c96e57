"""Parts of a wrapped model without a forward: each goes through the precision, whoever calls it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from nucleate.dimensions.parts import parts_of
from nucleate.wrappers.module import ModuleWrapper


def surround_parts(wrapper: ModuleWrapper) -> None:
    """Let each part of a model without a forward run as the model's own forward would. Other models do not change.

    Args:
        wrapper: The wrapper of the model.
    """
    for _, part in parts_of(wrapper.module):
        vars(part)["forward"] = PartForward(wrapper, part)


class PartForward:
    """The forward of a part, in the surroundings of the wrapped model.

    Args:
        wrapper: The wrapper of the model.
        part: The part.
    """

    def __init__(self, wrapper: ModuleWrapper, part: nn.Module) -> None:
        self._wrapper, self._part = wrapper, part
        self._own = vars(part).get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the part's own forward with precision and strategy, unless a method of the model runs in them already."""
        return self._wrapper.run_part(self._forward, args, kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._forward)

    @property
    def _forward(self) -> Callable[..., Any]:
        own: Callable[..., Any] = self._own or type(self._part).forward.__get__(self._part)
        return own

    def __deepcopy__(self, memo: dict[int, Any]) -> PartForward:
        """Copy the part alone; a wrapper that is being copied too is in the memo."""
        clone = object.__new__(PartForward)
        memo[id(self)] = clone
        clone._wrapper = memo.get(id(self._wrapper), self._wrapper)
        clone._part, clone._own = copy.deepcopy((self._part, self._own), memo)
        return clone
