"""The page docs/from-fabric.md: each row is true, and no public name of Fabric is left out."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import nucleate
from nucleate import Runtime
from nucleate.cluster import settings
from nucleate.errors import PluginNotFoundError
from nucleate.registry import ACCELERATORS, STRATEGIES
from nucleate.wrappers import DataLoaderWrapper, ModuleWrapper, OptimizerWrapper

PAGE = Path(__file__).parents[1] / "docs" / "from-fabric.md"
STATES = ("same", "better", "not here")

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the repository, not an installed package")


class Row(NamedTuple):
    section: str
    name: str
    state: str
    text: str


def rows() -> Iterator[Row]:
    """Yield a row for each name in the first column of the tables."""
    if not PAGE.exists():
        return
    for section in PAGE.read_text().split("\n## ")[1:]:
        title = section.splitlines()[0]
        if title == "What differs on purpose":
            continue
        for first, state, text in re.findall(r"^\| (`.*?`) \| (.*?) \| ?(.*?) ?\|$", section, re.MULTILINE):
            for name in re.findall(r"`(.*?)`", first):
                yield Row(title, name.strip('"'), state, text)


ROWS = list(rows())
#: Names that a class of the same purpose has, with other arguments, in `nucleate.precision`.
OTHER_ARGUMENTS = {"MixedPrecision", "HalfPrecision"}


def parameters(function: Any) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(function).parameters.values() if p.name != "self"]


def accepts(function: Any, wanted: inspect.Parameter, place: int) -> bool:
    """Return whether a function takes a parameter of Fabric's in the way that Fabric takes it."""
    mine = parameters(function)
    by_name = {p.name: p for p in mine}
    if wanted.kind in (wanted.VAR_POSITIONAL, wanted.VAR_KEYWORD):
        return any(p.kind == wanted.kind for p in mine)
    found = by_name.get(wanted.name)
    if found is None:
        return False
    if wanted.kind is wanted.POSITIONAL_OR_KEYWORD:
        return found.kind is wanted.POSITIONAL_OR_KEYWORD and mine.index(found) == place
    return found.kind in (wanted.KEYWORD_ONLY, wanted.POSITIONAL_OR_KEYWORD)


def has_method(name: str) -> bool:
    return hasattr(Runtime, name) if "." not in name else hasattr(nucleate.Strategy, name.partition(".")[2])


def is_wrapped_member(name: str) -> bool:
    kind, _, member = name.partition(".")
    if kind == "model":
        from nucleate.wrappers import module

        return hasattr(ModuleWrapper, member) or member in module._GIVEN or member in module._STEPS
    if kind == "optimizer":
        return hasattr(OptimizerWrapper, member) or member == "optimizer"
    # The constructor sets `device`.
    return hasattr(DataLoaderWrapper, member) or member in inspect.signature(DataLoaderWrapper.__init__).parameters


def is_strategy(name: str) -> bool:
    return name in STRATEGIES.names() or hasattr(importlib.import_module("nucleate.strategies"), name)


def is_accelerator(name: str) -> bool:
    known = {*ACCELERATORS.names(), "auto", "gpu"}
    return name in known or hasattr(importlib.import_module("nucleate.accelerators"), name)


def is_precision(name: str) -> bool:
    if not name[0].isupper():
        try:
            Runtime(accelerator="cpu", precision=name)
        except PluginNotFoundError:
            return False
        return True
    return name not in OTHER_ARGUMENTS and hasattr(importlib.import_module("nucleate.precision"), name)


def is_keyword(name: str) -> bool:
    strategy, _, keyword = name.rstrip(")").partition("(")
    function = getattr(importlib.import_module("nucleate.strategies"), strategy).__init__
    return keyword in inspect.signature(function).parameters


def is_in(module: str) -> Callable[[str], bool]:
    return lambda name: hasattr(importlib.import_module(module), name)


#: For each section, whether nucleate has a name of it.
PRESENT: dict[str, Callable[[str], bool]] = {
    "Constructor": lambda name: name in inspect.signature(Runtime.__init__).parameters,
    "Methods and attributes": has_method,
    "What setup returns": is_wrapped_member,
    "Top level": lambda name: hasattr(nucleate, "Runtime" if name == "Fabric" else name),
    "Strategies": is_strategy,
    "Keywords of strategies": is_keyword,
    "Accelerators": is_accelerator,
    "Precisions": is_precision,
    "Plugins": is_in("nucleate.cluster"),
    "Loggers": is_in("nucleate.loggers"),
    "Utilities": is_in("nucleate.report"),
    "Command line and environment": lambda name: name in vars(settings).values(),
}


def test_every_row_has_a_section_a_state_and_words_where_it_is_not_the_same() -> None:
    assert {row.section for row in ROWS} == set(PRESENT)
    assert {row.state for row in ROWS} == set(STATES)
    assert not [row for row in ROWS if row.state != "same" and not row.text]
    names = [(row.section, row.name) for row in ROWS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.section}: {row.name}" for row in ROWS])
def test_a_name_is_here_unless_the_row_says_that_it_is_not(row: Row) -> None:
    assert PRESENT[row.section](row.name) is (row.state != "not here")


# -- beside Fabric itself ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fabric() -> Any:
    pytest.importorskip("lightning", reason="lightning is not installed")
    return importlib.import_module("lightning.fabric")


def listed(*sections: str) -> set[str]:
    return {row.name for row in ROWS if row.section in sections}


def test_no_argument_and_no_member_of_fabric_is_left_out(fabric: Any) -> None:
    cls = fabric.Fabric
    assert listed("Constructor") == {p.name for p in parameters(cls.__init__)}
    members = {name for name in dir(cls) if not name.startswith("_")}
    assert {name for name in listed("Methods and attributes") if "." not in name} == members
    assert listed("Top level") == set(fabric.__all__)


def test_every_parameter_of_fabrics_methods_is_accepted_in_its_place(fabric: Any) -> None:
    refused = []
    for row in ROWS:
        theirs = inspect.getattr_static(fabric.Fabric, row.name, None)
        if row.section != "Methods and attributes" or theirs is None or isinstance(theirs, property):
            continue
        mine = getattr(Runtime, row.name)
        for place, wanted in enumerate(parameters(getattr(fabric.Fabric, row.name))):
            if not accepts(mine, wanted, place):
                refused.append(f"{row.name}({wanted})")
    assert not refused
    for wanted in parameters(fabric.Fabric.__init__):
        assert accepts(Runtime.__init__, wanted, 0), wanted


def test_no_public_class_name_or_keyword_of_fabrics_parts_is_left_out(fabric: Any) -> None:
    def public(module: str) -> set[str]:
        found = importlib.import_module(f"lightning.fabric.{module}")
        names = getattr(found, "__all__", None) or [n for n in dir(found) if n[0].isupper()]
        return {name for name in names if not name.startswith("_")}

    strategies = importlib.import_module("lightning.fabric.strategies")
    assert {*public("strategies"), *strategies.STRATEGY_REGISTRY} <= listed("Strategies")
    accelerators = importlib.import_module("lightning.fabric.accelerators")
    assert {*public("accelerators"), *accelerators.ACCELERATOR_REGISTRY} <= listed("Accelerators")
    plugins = {*public("plugins"), *public("plugins.environments"), *public("plugins.collectives")}
    assert plugins <= listed("Plugins", "Precisions")
    assert public("loggers") <= listed("Loggers")
    assert public("utilities") <= listed("Utilities")
    for name in ("FSDPStrategy", "DDPStrategy"):
        keywords = {p.name for p in parameters(getattr(strategies, name).__init__) if p.kind is not p.VAR_KEYWORD}
        assert {f"{name}({keyword})" for keyword in keywords} <= listed("Keywords of strategies")
