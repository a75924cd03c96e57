"""The bar that shows how many bytes are there: only where it was asked for, and only for what takes a while."""

from __future__ import annotations

import threading

import pytest

from nucleate.report import meter
from nucleate.report.meter import Meter, metered


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "DELAY_S", -1.0)


def test_it_shows_bytes_and_a_rate_and_ends_at_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    with metered(True), Meter(3 << 20, "loading") as bar:
        for _ in range(3):
            bar.add(1 << 20)
    shown = capsys.readouterr().err
    assert "loading: 100%" in shown
    assert "3.00M/3.00M" in shown
    assert "B/s" in shown


def test_without_being_asked_for_it_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Meter(10, "loading") as bar:
        bar.add(10)
    with metered(True), metered(False), Meter(10, "loading") as bar:
        bar.add(10)
    assert capsys.readouterr().err == ""


def test_what_is_quick_shows_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(meter, "DELAY_S", 60.0)
    with metered(True), Meter(10, "loading") as bar:
        bar.add(10)
    assert capsys.readouterr().err == ""


def test_threads_count_together(capsys: pytest.CaptureFixture[str]) -> None:
    with metered(True), Meter(4000, "loading") as bar:
        threads = [threading.Thread(target=lambda: [bar.add(1) for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "3.91k/3.91k" in capsys.readouterr().err


def test_without_tqdm_there_is_nothing_to_see(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    with metered(True), Meter(10, "loading") as bar:
        bar.add(10)
    assert capsys.readouterr().err == ""
