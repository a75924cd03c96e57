"""The command line that runs a program again: the same interpreter, options and arguments, or the reason against it."""

from __future__ import annotations

import multiprocessing
import sys
import types
from pathlib import Path

import pytest

from nucleate.cluster.command import command_again, program_file
from nucleate.errors import UsageError


def run_by(monkeypatch: pytest.MonkeyPatch, *command: str, file: str | None = None, module: str | None = None) -> None:
    """Make this process look as if a command line had started it."""
    main = types.ModuleType("__main__")
    if file is not None:
        main.__file__ = file
    main.__spec__ = None if module is None else types.SimpleNamespace(name=module)  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "orig_argv", ["python", *command])
    monkeypatch.setattr(sys, "argv", [*command[-1:]])


def test_a_script_keeps_options_and_arguments_and_is_found_from_any_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.touch()
    run_by(monkeypatch, "-u", "-W", "error", "jobs/train.py", "--of", "train.py", "$HOME", file=str(script))
    assert command_again("devices=2") == [
        *(sys.executable, "-u", "-W", "error", str(script), "--of", "train.py", "$HOME")
    ]


def test_a_module_and_a_program_in_the_command_line_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_by(monkeypatch, "-m", "pack.train", "--fast", file=str(tmp_path / "pack" / "train.py"), module="pack.train")
    assert command_again("devices=2") == [sys.executable, "-m", "pack.train", "--fast"]
    run_by(monkeypatch, "-c", "print(1)")
    monkeypatch.setattr(sys, "argv", ["-c"])
    assert program_file() is None
    assert command_again("devices=2") == [sys.executable, "-c", "print(1)"]


@pytest.mark.parametrize("file", [None, "<stdin>"])
def test_a_program_without_a_file_is_refused(monkeypatch: pytest.MonkeyPatch, file: str | None) -> None:
    run_by(monkeypatch, "-", file=file)
    with pytest.raises(UsageError, match=r"devices=2 runs the script again.*not read from a file.*launch\(main\)"):
        command_again("devices=2")


def test_a_session_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run_by(monkeypatch, "-q")
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(UsageError, match="interactive session"):
        command_again("devices=2")


def test_a_process_of_multiprocessing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run_by(monkeypatch, "-c", "spawn_main()")
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    with pytest.raises(UsageError, match="started by multiprocessing"):
        command_again("devices=2")
