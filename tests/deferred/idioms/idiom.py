"""Constructors as sentences: a function that builds on a module, collected by family and compared with eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.deferred.equality import assert_exact
from tests.device import ON_CPU

Body = Callable[[Any], None]


class Idioms(dict[str, Body]):
    """The idioms of one file; used as a decorator, it adds one under its name."""

    def __init__(self) -> None:
        super().__init__()
        self._only_on_host: dict[str, str] = {}

    def __call__(self, body: Body) -> Body:
        assert body.__name__ not in self, body.__name__
        self[body.__name__] = body
        return body

    def on_host(self, reason: str) -> Callable[[Body], Body]:
        """Add an idiom that no other device can run, for a reason."""

        def add(body: Body) -> Body:
            self._only_on_host[body.__name__] = reason
            return self(body)

        return add

    def each(self, test: Callable[[Body], None]) -> pytest.MarkDecorator:
        """Run a test once for each idiom."""
        params = []
        for name, body in self.items():
            reason = self._only_on_host.get(name)
            marks = [] if reason is None else [pytest.mark.skipif(not ON_CPU, reason=reason)]
            params.append(pytest.param(body, id=name, marks=marks))
        return pytest.mark.parametrize("body", params)(test)


class Constructed(nn.Module):
    """A module whose constructor is an idiom."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        body(self)


def hold(m: nn.Module, **values: Any) -> None:
    """Keep values as buffers, numbers and lists of numbers included, so that they are compared."""
    for name, value in values.items():
        m.register_buffer(name, value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64))


def assert_idiom_is_exact(body: Body) -> None:
    """Assert that the idiom builds the same model deferred and eagerly."""
    assert_exact(lambda: Constructed(body))
