"""The contract: two methods, a name, a check that refuses nothing by default."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from nucleate.accelerators.base import Accelerator
from nucleate.cluster.environment import Environment
from nucleate.plugin import Composition, Plugin
from nucleate.precision.base import Precision
from nucleate.strategies.base import Strategy


class Whole(Plugin):
    kind = "strategy"

    def module_init_context(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def setup(self, model: Any) -> Any:
        return model


def test_a_plugin_is_two_methods() -> None:
    assert Plugin.__abstractmethods__ == {"module_init_context", "setup"}
    assert Whole().setup("model") == "model"


@pytest.mark.parametrize(
    ("base", "required"),
    [
        (Accelerator, {"module_init_context", "setup", "is_available", "count", "select"}),
        (Precision, {"module_init_context", "setup", "dtype"}),
        # Its `setup` calls `lay_out`, which lays out nothing by default.
        (Strategy, {"module_init_context"}),
    ],
)
def test_a_base_asks_for_little_more(base: type[Plugin], required: set[str]) -> None:
    assert issubclass(base, Plugin)
    assert base.__abstractmethods__ == required


def test_the_kinds_differ() -> None:
    assert [base.kind for base in (Accelerator, Precision, Strategy)] == ["accelerator", "precision", "strategy"]


def test_a_plugin_keeps_the_name_it_was_asked_for_by() -> None:
    plugin = Whole.from_name("whole-variant")
    assert plugin.name == "whole-variant"
    assert repr(plugin) == "Whole(name='whole-variant')"
    assert Whole.name == ""


def test_check_refuses_nothing_by_default() -> None:
    whole = Whole()
    assert whole.check(Composition(whole, whole, whole, Environment(), torch.device("cpu"))) is None
