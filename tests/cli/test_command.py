"""What all commands share: how they start, what they say when something is wrong, and their exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nucleate import __version__
from nucleate.cli import main, text
from tests.cli.commands import Here, run, start

ROOT = Path(__file__).parents[2]


def test_the_script_that_an_installation_makes_is_this_command() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"nucleate": "nucleate.cli:main"}
    # What pip writes into the script.
    code = "import sys; from nucleate.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"nucleate {__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["--version"], ["verify"]])
def test_torch_is_not_imported_to_say_what_the_arguments_are(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom nucleate.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    assert not {'torch', 'safetensors'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert "AssertionError" not in done.stderr
    assert done.returncode == (2 if arguments == ["verify"] else 0)
    assert "usage: nucleate" in done.stdout + done.stderr or __version__ in done.stdout


def test_every_command_is_in_the_help_with_its_exit_status() -> None:
    status, out, _ = run("--help")
    assert status == 0
    for word in ("inspect", "convert", "verify", "exit status"):
        assert word in out


@pytest.mark.parametrize(
    "arguments",
    [[], ["look"], ["inspect"], ["convert", "a"], ["inspect", "a", "--jso"], ["convert", "a", "b", "--dtype", "int3"]],
)
def test_wrong_arguments_are_told_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage: nucleate" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["convert", "out"]])
def test_nothing_at_the_path_is_one_line_on_stderr_with_status_2(
    here: Here, tmp_path: Path, command: list[str]
) -> None:
    status, out, err = here(command[0], tmp_path / "nowhere", *(tmp_path / name for name in command[1:]))
    assert (status, out) == (2, "")
    assert err.startswith(f"nucleate {command[0]}: there is no checkpoint at {tmp_path}/nowhere")
    assert err.count("\n") == 1


def test_a_damaged_checkpoint_is_status_1(here: Here, file: Path, folder: Path) -> None:
    os.truncate(file, 100)
    for command in (["inspect", file], ["convert", file, file.with_name("out")], ["verify", file]):
        status, _, err = here(*command)
        assert status == 1
        assert "Traceback" not in err
    # A shard that is missing is damage, not a path that is wrong.
    next(folder.glob("model-00001*")).unlink()
    assert here("inspect", folder)[0] == 1


def test_a_traceback_is_shown_when_it_is_asked_for(here: Here, tmp_path: Path) -> None:
    for arguments in (["--traceback", "inspect", tmp_path / "x"], ["inspect", tmp_path / "x", "--traceback"]):
        err = here(*arguments)[2]
        assert "Traceback (most recent call last)" in err
        assert "open_checkpoint" in err or "resolve" in err


def test_a_fault_of_the_command_itself_is_one_line_too(here: Here, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "table", lambda *_, **__: 1 / 0)
    status, _, err = here("inspect", file)
    assert status == 1
    assert err == (
        "nucleate inspect: ZeroDivisionError: division by zero. This is a fault of nucleate; --traceback shows where.\n"
    )


def test_names_that_would_steer_a_terminal_are_shown_escaped(here: Here, tmp_path: Path) -> None:
    save_file({"a\x1b[2J\nb": torch.ones(1)}, tmp_path / "a.safetensors")
    _, out, _ = here("inspect", tmp_path / "a.safetensors")
    assert "\x1b" not in out
    assert r"a\x1b[2J\nb" in out
    os.rename(tmp_path / "a.safetensors", tmp_path / "a\x1b[2J.safetensors")
    os.truncate(tmp_path / "a\x1b[2J.safetensors", 20)
    assert "\x1b" not in here("inspect", tmp_path / "a\x1b[2J.safetensors")[2]


def test_a_reader_that_has_seen_enough_ends_the_command_silently(tmp_path: Path) -> None:
    save_file({f"layer.{number}": torch.ones(1) for number in range(5000)}, tmp_path / "a.safetensors")
    with start("inspect", tmp_path / "a.safetensors") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("tensor")
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == ""


def test_an_interrupt_leaves_nothing_behind_and_says_so(tmp_path: Path) -> None:
    # A pipe in the place of a file would be refused, so a large one: it takes a while.
    with open(tmp_path / "a.safetensors", "wb") as large:
        header = b'{"a":{"dtype":"U8","shape":[2000000000],"data_offsets":[0,2000000000]}}'
        large.write(len(header).to_bytes(8, "little") + header)
        large.truncate(8 + len(header) + 2_000_000_000)
    out = tmp_path / "out"
    out.mkdir()

    def take_interrupts() -> None:
        # A shell's background job, as tests may be, has them ignored, and hands that on.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with start("convert", tmp_path / "a.safetensors", out / "b.pt", preexec_fn=take_interrupts) as process:
        deadline = time.monotonic() + 60
        while not any(out.glob(".b.pt.draft*")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "nucleate convert: interrupted."
    assert "Traceback" not in err
    assert os.listdir(out) == []


def test_a_small_file_is_shown_in_a_moment(file: Path) -> None:
    """Nothing of weight is imported besides torch: a limit in seconds would measure the machine."""
    code = (
        "import sys, torch, torch.nn\nbefore = set(sys.modules)\nfrom nucleate.cli import main\n"
        "main(['inspect', sys.argv[1]])\n"
        "new = {name for name in set(sys.modules) - before}\n"
        "print(sorted(name for name in new if name.startswith(('torch', 'safetensors', 'tqdm', 'numpy'))))"
    )
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
