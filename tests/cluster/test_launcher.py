"""The launcher of a rank: its parent, also through a script between them, and no one for ranks started by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nucleate.cluster import launcher, parent
from nucleate.cluster.environment import RUN_ID

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks at variables in /proc")


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the processes that this one was bound to, without binding it."""
    found: list[int] = []
    monkeypatch.setattr(parent, "bind", found.append)
    monkeypatch.setattr(launcher, "_is_bound", False)
    return found


@contextmanager
def shell(*command: str) -> Iterator[int]:
    """Start a script with the variables of this process, and give the process of the shell that would start a rank."""
    process = subprocess.Popen(
        [*command, "sh", "-c", "echo $$; read line; true"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.communicate("\n")


def take_place(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    for name, value in ((RUN_ID, "none"), ("RANK", "0"), ("MASTER_PORT", str(port))):
        monkeypatch.setenv(name, value)


def test_a_rank_is_bound_once_to_its_launcher(bound: list[int]) -> None:
    launcher.bind("run 1")
    launcher.bind("run 1")
    assert bound == [os.getppid()]


def test_a_rank_that_was_started_by_hand_is_not_bound(bound: list[int]) -> None:
    launcher.bind("")
    assert bound == []


@needs_proc
@pytest.mark.parametrize("command", [[], ["sh", "-c", '"$@"; true', "sh"]])
def test_a_script_between_the_launcher_and_the_rank_is_not_the_launcher(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    take_place(monkeypatch, 1)
    with shell(*command) as started:
        monkeypatch.setattr(os, "getppid", lambda: started)
        assert launcher.process() == os.getpid()


@needs_proc
def test_a_launcher_that_a_rank_of_another_run_has_started_is_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    take_place(monkeypatch, 1)
    with shell() as started:
        take_place(monkeypatch, 2)
        monkeypatch.setattr(os, "getppid", lambda: started)
        assert launcher.process() == started
