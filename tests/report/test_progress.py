from __future__ import annotations

import sys

import pytest

from nucleate.errors import MissingDependencyError
from nucleate.report import progress


def test_a_loop_sees_every_item_with_and_without_a_bar() -> None:
    assert list(progress("abc", enabled=False)) == ["a", "b", "c"]
    assert list(progress("abc")) == ["a", "b", "c"]


def test_a_bar_shows_its_description_count_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress(range(3), description="training")
    for step in bar:
        bar.show(loss=f"{step}.5")
    shown = capsys.readouterr()
    assert shown.out == ""
    last = shown.err.split("\r")[-1]
    for words in ("training", "3/3", "loss=2.5"):
        assert words in last


def test_a_resumed_bar_starts_where_the_first_one_ended(capsys: pytest.CaptureFixture[str]) -> None:
    list(progress(range(6, 10), initial=6))
    drawn = capsys.readouterr().err.split("\r")
    assert "6/10" in drawn[1]
    assert "10/10" in drawn[-1]


def test_a_disabled_bar_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress(range(3), enabled=False)
    for _ in bar:
        bar.show(loss=1)
        bar.print("a line")
    assert capsys.readouterr() == ("", "")


def test_a_line_is_printed_between_bars_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress(range(1))
    for _ in bar:
        bar.print("a line")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "a line\n" in shown.err


def test_an_iterable_without_a_length_has_no_total(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(iter(range(3)))) == [0, 1, 2]
    assert "3step" in capsys.readouterr().err


def test_a_loop_that_raises_closes_its_bar(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> None:
        for step in progress(range(3)):
            if step == 1:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        body()
    assert capsys.readouterr().err.endswith("\n")


def test_without_tqdm_the_error_carries_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(MissingDependencyError, match=r"pip install nucleate\[progress\]"):
        progress(range(3))
    assert list(progress(range(3), enabled=False)) == [0, 1, 2]
