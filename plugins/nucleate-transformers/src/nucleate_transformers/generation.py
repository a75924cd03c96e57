"""`generate` of a model that several ranks compute together: all of them choose the same tokens."""

from __future__ import annotations

from types import MethodType
from typing import Any

from transformers import PreTrainedModel

from nucleate import Strategy
from nucleate.dimensions.common_stream import CommonStream


class CommonGeneration:
    """The method `generate` of a model whose matrices are split.

    The ranks of a group of tensor parallel hold one text. With random numbers of their own they would choose different
    tokens, and compute with each other's.

    Args:
        strategy: The strategy, whose mesh has the axis `tp`.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy

    def surround(self, model: PreTrainedModel) -> None:
        """Give a model this method."""
        model.__dict__["generate"] = MethodType(self, model)

    def __call__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """Give the ranks of a group the same random numbers, then generate."""
        own: Any = getattr(type(model), "generate")  # noqa: B009 - a mixin of subclasses has it
        CommonStream(self._strategy.group_of("tp"), self._strategy.device).share()
        return own(model, *args, **kwargs)
