from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nucleate.errors import ConfigurationError, MissingDependencyError
from nucleate.report import save_loss_curve

LOSSES = [5.5 / (1 + step / 20) for step in range(200)]


def test_a_curve_becomes_a_png_in_a_folder_that_is_made(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = save_loss_curve(tmp_path / "new" / "loss.png", LOSSES, validation={100: 1.0, 200: 0.7}, title="a run")
    assert path == tmp_path / "new" / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_the_suffix_chooses_the_format_and_the_words_are_in_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = save_loss_curve(str(tmp_path / "loss.svg"), LOSSES, title="a run", unit="nats per byte").read_text()
    assert text.startswith("<?xml")
    for words in ("a run", "loss (nats per byte)", "training, mean of 5 steps"):
        assert f"<!-- {words} -->" in text


@pytest.mark.parametrize("losses", [[3.0], [3.0, float("nan"), 2.0], [float("inf")] * 3])
def test_short_and_broken_curves_are_drawn_too(tmp_path: Path, losses: list[float]) -> None:
    pytest.importorskip("matplotlib")
    assert save_loss_curve(tmp_path / "loss.png", losses).stat().st_size > 0


def test_an_empty_curve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="`losses` is empty"):
        save_loss_curve(tmp_path / "loss.png", [])
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_carries_the_install_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"pip install nucleate\[plot\]"):
        save_loss_curve(tmp_path / "loss.png", LOSSES)
