"""Deferred models under transformers' `Trainer` and Accelerate: they train as eager ones, or say what they lack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nucleate.deferred import deferred
from nucleate.errors import DeferredUseError
from nucleate.materialize import materialize
from tests.device import cpu_only
from tests.integrations.trained import assert_same, by_accelerate, by_trainer, llama

pytestmark = [
    cpu_only("the libraries choose the device"),
    # Hugging Face's own calls of functions that torch deprecates.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
Way = Callable[..., dict[str, Any]]


@pytest.fixture(params=[by_trainer, by_accelerate])
def train(request: pytest.FixtureRequest) -> Way:
    way: Way = request.param
    return way


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_materialized_model_trains_as_an_eager_one_does(train: Way, when: str, tmp_path: Path) -> None:
    expected = train(llama(), tmp_path)
    with deferred():
        model = llama()
    if when == "before":
        materialize(model)
    assert_same(train(model, tmp_path, lambda: materialize(model)), expected)


def test_a_model_that_is_still_deferred_says_what_to_do(train: Way, tmp_path: Path) -> None:
    with deferred():
        model = llama()
    with pytest.raises(DeferredUseError, match=r"model.embed_tokens.weight is deferred .*materialize\(model\)"):
        train(model, tmp_path)
