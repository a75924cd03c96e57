"""Looks at the parameters of a wrapped model, which must show those that optimizers and checkpoints know."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from nucleate.strategies.base import Strategy

#: The methods of a module that read or write its parameters.
LOOKS = (
    *("parameters", "named_parameters", "get_parameter", "apply", "requires_grad_", "zero_grad"),
    *("state_dict", "load_state_dict", "_load_from_state_dict"),
)


def look(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a wrapper that runs where the strategy shows shards in the place of gathered parameters.

    Args:
        method: The method of the wrapper.
    """

    @functools.wraps(method)
    def looked(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
        shown = wrapper._strategy.shards_shown(wrapper.forward_module)
        if shown is None:
            return method(wrapper, *args, **kwargs)
        with shown:
            result = method(wrapper, *args, **kwargs)
            # A generator must not run after the context has ended.
            return iter([*result]) if isinstance(result, Iterator) else result

    return looked


def shown_by(strategy: Strategy, module: nn.Module) -> Callable[[], AbstractContextManager[object] | None]:
    """Return a function that shows the shards of a module, for whoever must not keep the module alive.

    Args:
        strategy: The strategy.
        module: The module that its `setup` returned.
    """
    living = weakref.ref(module)

    def shown() -> AbstractContextManager[object] | None:
        now = living()
        return None if now is None else strategy.shards_shown(now)

    return shown
