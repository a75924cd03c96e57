"""Names to classes: what is listed, found, refused, and what asking costs."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nucleate.accelerators.base import Accelerator
from nucleate.errors import PluginConflictError, PluginLoadError, PluginNotFoundError
from nucleate.precision.base import Precision
from nucleate.registry import ACCELERATORS, PRECISIONS, STRATEGIES, Registry
from nucleate.strategies.base import Strategy

PLUGIN = """
from contextlib import nullcontext
from nucleate.strategies.base import Strategy

class Mine(Strategy):
    def module_init_context(self):
        return nullcontext()

    def setup(self, model):
        return model

not_a_plugin = object()
"""


def registry(builtins: dict[str, str] | None = None, known: dict[str, str] | None = None) -> Registry:
    return Registry(
        kind="strategy",
        group="nucleate.test_strategies",
        base="nucleate.strategies.base:Strategy",
        builtins=builtins or {},
        known=known or {},
    )


class Site:
    """A folder on `sys.path` in which distributions are installed by writing their metadata."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def distribution(self, name: str, entry_points: str, modules: dict[str, str] | None = None) -> None:
        info = self.path / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[nucleate.test_strategies]\n{entry_points}\n")
        for module, text in (modules or {}).items():
            (self.path / f"{module}.py").write_text(text)
        importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("mine", "broken", "untouched"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return Site(tmp_path)


@pytest.mark.parametrize(
    ("builtin", "base"), [(ACCELERATORS, Accelerator), (PRECISIONS, Precision), (STRATEGIES, Strategy)]
)
def test_every_builtin_is_what_its_table_says(builtin: Registry, base: type) -> None:
    for name in builtin.builtins:
        cls = builtin.get(name)
        assert issubclass(cls, base)
        assert cls.kind == builtin.kind


@pytest.mark.parametrize("builtin", [PRECISIONS, STRATEGIES])
def test_every_builtin_is_created_by_name(builtin: Registry) -> None:
    for name in builtin.builtins:
        assert builtin.create(name).name == name


def test_the_builtin_names() -> None:
    assert {"cpu", "cuda"} <= set(ACCELERATORS.names())
    assert {"no-cast", "32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"} <= set(
        PRECISIONS.names()
    )
    assert {"single_device", "ddp", "fsdp"} <= set(STRATEGIES.names())


def test_a_distribution_offers_a_plugin_by_entry_point(site: Site) -> None:
    site.distribution("nucleate-mine", "mine = mine:Mine", {"mine": PLUGIN})
    plugins = registry({"single": "nowhere:Single"})
    assert plugins.names() == ["mine", "single"]
    plugin = plugins.create("mine")
    assert isinstance(plugin, Strategy)
    assert plugin.name == "mine"


def test_listing_imports_nothing(site: Site) -> None:
    site.distribution("nucleate-untouched", "untouched = untouched:Mine", {"untouched": "raise SystemExit('imported')"})
    assert registry({"single": "nowhere:Single"}).names() == ["single", "untouched"]
    assert "untouched" not in sys.modules


def test_a_broken_plugin_is_named_and_leaves_the_others_alone(site: Site) -> None:
    site.distribution("nucleate-mine", "mine = mine:Mine", {"mine": PLUGIN})
    site.distribution("nucleate-broken", "broken = broken:Broken", {"broken": "import a_package_that_is_not_there"})
    plugins = registry()
    assert plugins.names() == ["broken", "mine"]
    assert plugins.get("mine").__name__ == "Mine"
    with pytest.raises(PluginLoadError, match="'broken' from nucleate-broken .*a_package_that_is_not_there") as caught:
        plugins.get("broken")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize("attribute", ["not_a_plugin", "nullcontext"])
def test_what_is_no_subclass_of_the_base_is_refused(site: Site, attribute: str) -> None:
    site.distribution("nucleate-mine", f"mine = mine:{attribute}", {"mine": PLUGIN})
    with pytest.raises(PluginLoadError, match="not a subclass of nucleate.strategies.base:Strategy"):
        registry().get("mine")


def test_a_class_that_is_not_there_is_a_load_error(site: Site) -> None:
    site.distribution("nucleate-mine", "mine = mine:Missing", {"mine": PLUGIN})
    with pytest.raises(PluginLoadError, match="AttributeError.*Missing"):
        registry().get("mine")


def test_a_name_offered_twice_names_both_distributions(site: Site) -> None:
    site.distribution("nucleate-mine", "mine = mine:Mine", {"mine": PLUGIN})
    site.distribution("nucleate-other", "mine = other:Mine")
    with pytest.raises(PluginConflictError) as caught:
        registry().get("mine")
    assert "nucleate-mine" in str(caught.value)
    assert "nucleate-other" in str(caught.value)


def test_a_builtin_is_not_replaced_by_a_distribution(site: Site) -> None:
    site.distribution("nucleate-mine", "single = mine:Mine", {"mine": PLUGIN})
    with pytest.raises(PluginConflictError, match=r"nucleate \(nowhere:Single\) and by nucleate-mine \(mine:Mine\)"):
        registry({"single": "nowhere:Single"}).get("single")


def test_an_unknown_name_suggests_close_ones_and_lists_the_installed() -> None:
    with pytest.raises(PluginNotFoundError) as caught:
        STRATEGIES.get("fspd")
    message = str(caught.value)
    assert "no strategy plugin named 'fspd'" in message
    assert "Did you mean 'fsdp'" in message
    # An installed package may add names.
    assert re.search(r"Installed: .*\bddp, ddp_find_unused_parameters_false", message)


def test_a_name_that_resembles_nothing_gets_no_suggestion() -> None:
    with pytest.raises(PluginNotFoundError) as caught:
        STRATEGIES.get("quantum")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("asked", ["bitsandbytes", "bitsandbites"])
def test_an_absent_but_known_name_carries_its_install_line(asked: str) -> None:
    plugins = registry(known={"bitsandbytes": "pip install nucleate-bitsandbytes"})
    with pytest.raises(PluginNotFoundError, match=r"\(pip install nucleate-bitsandbytes\)"):
        plugins.get(asked)
    assert plugins.names() == []


@pytest.mark.parametrize("asked", ["bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-fp4-dq", "bnb-int8", "bnb-int8-training"])
def test_the_quantized_precisions_say_what_installs_them(asked: str) -> None:
    without_plugins = dataclasses.replace(PRECISIONS, group="nobody.offers.this")
    with pytest.raises(PluginNotFoundError, match=r"\(pip install nucleate-bitsandbytes\)"):
        without_plugins.get(asked)


def test_an_installed_name_needs_no_install_line(site: Site) -> None:
    site.distribution("nucleate-mine", "mine = mine:Mine", {"mine": PLUGIN})
    with pytest.raises(PluginNotFoundError) as caught:
        registry(known={"mine": "pip install nucleate-mine"}).get("mime")
    assert "pip install" not in str(caught.value)


def test_importing_the_registry_imports_no_plugin() -> None:
    program = (
        "import sys, nucleate.registry as r\n"
        "r.STRATEGIES.names(), r.PRECISIONS.names(), r.ACCELERATORS.names()\n"
        "print([m for m in sys.modules if m in ('nucleate.strategies.fsdp', 'nucleate.precision.mixed', "
        "'nucleate.accelerators.cuda')])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
