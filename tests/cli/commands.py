"""How the command is started in tests: as users do, or in this process, which is quicker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nucleate.cli import main


def start(*arguments: str | Path, **options: object) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    command = [sys.executable, "-m", "nucleate", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **options)  # type: ignore[call-overload]


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the command in a process of its own; return its exit status and what it wrote."""
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


class Here:
    """Runs the command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        status = main(list(map(str, arguments)))
        return status, *self._capsys.readouterr()
