"""Callbacks: whose methods are called when, and with which arguments."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nucleate import Runtime
from nucleate.errors import ConfigurationError, PluginLoadError, PluginNotFoundError, UsageError
from nucleate.registry import CALLBACKS, _entry_points
from tests.device import ACCELERATOR


class Recorder:
    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.not_a_method = 3

    def on_epoch_end(self, loss: float, *, epoch: int) -> None:
        self.events.append(("epoch", (loss, epoch)))

    def on_after_setup(self, fabric: Runtime, module: nn.Module) -> None:
        self.events.append(("setup", (fabric, module)))

    def on_after_optimizer_step(self, strategy: Any, optimizer: Any) -> None:
        self.events.append(("step", (strategy, optimizer)))


class Everything:
    def __init__(self) -> None:
        self.names: list[str] = []

    def on_after_setup(self, **kwargs: Any) -> None:
        self.names += kwargs

    on_epoch_end = print


def runtime(callbacks: Any) -> Runtime:
    return Runtime(accelerator=ACCELERATOR, strategy="single_device", callbacks=callbacks)


def test_call_reaches_each_callback_that_has_the_method_in_their_order() -> None:
    first, second = Recorder(), Recorder()
    second.events = first.events
    one = runtime([first, object(), second])
    one.call("on_epoch_end", 0.5, epoch=3, unknown="left out")
    assert first.events == [("epoch", (0.5, 3))] * 2
    one.call("nobody_has_this", 1)


def test_arguments_go_to_methods_that_take_any_or_do_not_show_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    callback = Everything()
    one = runtime(callback)
    one.setup(nn.Linear(2, 2))
    assert callback.names == ["runtime", "fabric", "module"]
    one.call("on_epoch_end", "printed", end="!")
    assert capsys.readouterr().out == "printed!"


def test_setup_and_steps_call_their_hooks() -> None:
    callback = Recorder()
    one = runtime(callback)
    model = nn.Linear(2, 2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped, optimizer = one.setup(model, inner)
    assert callback.events == [("setup", (one, wrapped))]
    second = one.setup_optimizers(torch.optim.SGD(wrapped.parameters(), lr=0.1))
    optimizer.step()
    second.step()
    copy.copy(optimizer).step()
    assert callback.events[1:] == [("step", (one.strategy, o)) for o in (inner, second.optimizer, inner)]
    pickle.loads(pickle.dumps(optimizer)).step()
    assert len(callback.events) == 4


def test_an_attribute_that_is_not_a_method_is_refused_before_any_method_runs() -> None:
    first, second = Recorder(), Recorder()
    first.not_a_method = lambda: first.events.append(("called", None))  # type: ignore[assignment]
    with pytest.raises(UsageError, match=r"call\('not_a_method'\): Recorder.not_a_method is 3, which is not a method"):
        runtime([first, second]).call("not_a_method")
    assert first.events == []


def test_the_users_list_stays_the_users() -> None:
    given: list[Any] = [Recorder()]
    one = runtime(given)
    given.append(Recorder())
    assert one.callbacks == given[:1]
    one.callbacks.clear()
    assert one.callbacks == given[:1]
    assert runtime(None).callbacks == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Recorder, r"which is not a callback. Give objects, such as Recorder\(\)"),
        ([None], "has None, which is not a callback"),
        ([(one := Recorder()), one], "the same object twice"),
    ],
)
def test_what_is_not_a_callback_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        runtime(given)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a distribution that offers callbacks by entry point."""
    (tmp_path / "offered_callbacks.py").write_text(
        "class One:\n    def hook(self): print('one')\n"
        "def several(): return [One(), One()]\n"
        "def broken(): raise OSError('no disk')\n"
    )
    info = tmp_path / "offered-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offered\nVersion: 1.0\n")
    names = {"one": "One", "several": "several", "broken": "broken"}
    lines = [f"{name} = offered_callbacks:{target}" for name, target in names.items()]
    (info / "entry_points.txt").write_text("\n".join(["[nucleate.callbacks]", *lines]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "offered_callbacks", raising=False)
    _entry_points.cache_clear()
    vars(CALLBACKS).pop("_installed", None)
    yield
    _entry_points.cache_clear()
    vars(CALLBACKS).pop("_installed", None)
    sys.modules.pop("offered_callbacks", None)


@pytest.mark.usefixtures("installed")
def test_installed_callbacks_are_used_only_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert runtime(None).callbacks == []
    assert "offered_callbacks" not in sys.modules
    runtime(["one", "several"]).call("hook")
    assert capsys.readouterr().out == "one\n" * 3
    with pytest.raises(PluginLoadError, match=r"callback 'broken' from offered \(offered_callbacks:broken\).*no disk"):
        runtime("broken")
    with pytest.raises(PluginNotFoundError, match="no callback plugin named 'severl'. Did you mean 'several'"):
        runtime("severl")
