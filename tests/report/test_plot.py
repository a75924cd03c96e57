from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from nucleate.errors import ConfigurationError, MissingDependencyError
from nucleate.report import save_loss_curve

LOSSES = [5.5 / (1 + step / 20) for step in range(200)]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def places(line: ElementTree.Element) -> list[tuple[float, float]]:
    pairs = (pair.split(",") for pair in line.attrib["points"].split())
    return [(float(x), float(y)) for x, y in pairs]


def test_a_curve_becomes_a_png_in_a_folder_that_is_made(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = save_loss_curve(tmp_path / "new" / "loss.png", LOSSES, validation={100: 1.0, 200: 0.7}, title="a run")
    assert path == tmp_path / "new" / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_an_svg_needs_no_other_package_and_holds_the_curve_and_the_words(no_matplotlib: None, tmp_path: Path) -> None:
    path = save_loss_curve(
        str(tmp_path / "new" / "loss.svg"), LOSSES, validation={100: 1.0, 200: 0.7}, title="a < b", unit="nats per byte"
    )
    root = ElementTree.parse(path).getroot()
    words = {text.text for text in root.iter(f"{SVG}text")}
    assert {"a < b", "step", "loss (nats per byte)", "training, mean of 5 steps", "validation"} <= words
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    curve, *_ = (line for line in map(places, root.iter(f"{SVG}polyline")) if len(line) == 200)
    assert all(0 < x < width and 0 < y < height for x, y in curve)
    # A loss that falls: to the right and downwards, where y grows.
    assert curve == sorted(curve)
    assert [y for _, y in curve] == sorted(y for _, y in curve)
    assert sum(dot.tag == f"{SVG}circle" for dot in root.iter()) == 2 + 2, "two validations, and the legend's dots"


@pytest.mark.parametrize("losses", [[3.0], [3.0, float("nan"), 2.0], [float("inf")] * 3, [0.0, 0.0], [-2e-9, 1e9]])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_short_and_broken_curves_are_drawn_too(tmp_path: Path, losses: list[float], suffix: str) -> None:
    if suffix == "png":
        pytest.importorskip("matplotlib")
    path = save_loss_curve(tmp_path / f"loss.{suffix}", losses, validation={1: losses[0]})
    assert path.stat().st_size > 0
    if suffix == "svg":
        lines = map(places, ElementTree.parse(path).getroot().iter(f"{SVG}polyline"))
        assert all(0 < x < 1000 and 0 < y < 1000 for line in lines for x, y in line)


def test_an_empty_curve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="`losses` is empty"):
        save_loss_curve(tmp_path / "loss.png", [])
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_carries_the_install_line(no_matplotlib: None, tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"as \.png needs matplotlib.*pip install nucleate\[plot\].*\.svg"):
        save_loss_curve(tmp_path / "loss.png", LOSSES)
