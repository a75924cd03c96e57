"""The example that the README starts with: it learns, resumes exactly, and runs on every strategy and precision."""

from __future__ import annotations

import csv
import importlib.util
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.multi.ranks import ROOT, fork_ranks, run_ranks

SCRIPT = ROOT / "examples" / "01_train_gpt.py"
TINY = ("--size", "tiny", "--accelerator", "cpu", "--batch-size", "4", "--sample-bytes", "8")
PRECISIONS = ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed")

Main = Callable[[list[str]], None]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Main:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # as python does for the script it runs
    spec = importlib.util.spec_from_file_location("train_gpt", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main  # type: ignore[no-any-return]


def arguments(out: Path, *more: object) -> list[str]:
    return [*TINY, "--out", str(out), *map(str, more)]


def losses_of(out: Path) -> list[float]:
    with (out / "losses.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def log_of(out: Path) -> bytes:
    return (out / "losses.csv").read_bytes()


def test_it_learns_and_leaves_a_sample_a_checkpoint_a_log_and_a_picture(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(arguments(tmp_path, "--steps", 60, "--learning-rate", 1e-2, "--validate-every", 20))
    losses = losses_of(tmp_path)
    assert len(losses) == 60
    assert sum(losses[-5:]) / 5 < 3.6 < 5 < losses[0]
    assert (tmp_path / "checkpoint").is_dir()
    assert "training, each step" in (tmp_path / "losses.svg").read_text()
    shown = capsys.readouterr()
    assert f"Plot: {tmp_path / 'losses.svg'}" in shown.out
    assert all(character.isprintable() for line in shown.out.splitlines() for character in line)
    assert "32,928 parameters" in shown.out
    assert "\ndef " in shown.out
    for words in ("60/60", "loss=", "tokens/s=", "peak=", "step 40: validation loss "):
        assert words in shown.err


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_resumed_run_logs_what_an_uninterrupted_one_logs_bit_for_bit(
    main: Main, tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--steps", 12, "--precision", precision, "--validate-every", 5)
    main(arguments(tmp_path / "whole", *common))
    whole = capsys.readouterr().out
    main(arguments(tmp_path / "parts", *common, "--stop-after", 4))
    main(arguments(tmp_path / "parts", *common, "--stop-after", 7, "--resume"))
    assert len(losses_of(tmp_path / "parts")) == 7
    capsys.readouterr()
    main(arguments(tmp_path / "parts", *common, "--resume"))
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert capsys.readouterr().out.split("\n")[1:-4] == whole.split("\n")[1:-4], "the samples differ"


def test_a_killed_run_resumes_from_its_last_checkpoint_to_the_same_losses(main: Main, tmp_path: Path) -> None:
    common = ("--steps", 2000, "--checkpoint-every", 5, "--validate-every", 1000)
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments(tmp_path / "parts", *common)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        give_up = time.monotonic() + 60
        while not (tmp_path / "parts" / "checkpoint").exists():
            assert process.poll() is None, "the run ended by itself"
            assert time.monotonic() < give_up, "no checkpoint within a minute"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()

    main(arguments(tmp_path / "parts", *common, "--resume", "--stop-after", 1))  # only writes the log
    done = len(losses_of(tmp_path / "parts"))
    assert done >= 5
    assert done % 5 == 0
    stop = ("--stop-after", done + 3)
    main(arguments(tmp_path / "parts", *common, "--resume", *stop))
    main(arguments(tmp_path / "whole", *common, *stop))
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_learns_in_every_precision(main: Main, tmp_path: Path, precision: str) -> None:
    main(arguments(tmp_path, "--steps", 12, "--precision", precision, "--learning-rate", 1e-2))
    losses = losses_of(tmp_path)
    assert losses[-1] < losses[0] - 0.5


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process, alone and on one thread."""
    out = tmp_path_factory.mktemp("alone")
    fork_ranks(SCRIPT, 1, *arguments(out, "--steps", 12))
    return losses_of(out)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_learn_as_one_does_and_resume_exactly(alone: list[float], tmp_path: Path, strategy: str) -> None:
    common = ("--steps", 12, "--strategy", strategy, "--validate-every", 5)
    output = run_ranks(SCRIPT, 2, *arguments(tmp_path / "whole", *common)).stdout
    assert "2 x cpu" in output
    assert output.count("def ") == 1, "only rank 0 prints"
    assert losses_of(tmp_path / "whole") == pytest.approx(alone, abs=2e-5)
    fork_ranks(SCRIPT, 2, *arguments(tmp_path / "parts", *common, "--stop-after", 7))
    fork_ranks(SCRIPT, 2, *arguments(tmp_path / "parts", *common, "--resume"))
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_learn_in_every_precision(tmp_path: Path, strategy: str) -> None:
    # One group of processes for all precisions.
    script = tmp_path / "every_precision.py"
    script.write_text(
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "out, *arguments = sys.argv[1:]\n"
        f"for precision in {PRECISIONS!r}:\n"
        f"    sys.argv = [{str(SCRIPT)!r}, *arguments, '--precision', precision, '--out', f'{{out}}/{{precision}}']\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    more = ("--steps", 8, "--strategy", strategy, "--learning-rate", 1e-2)
    fork_ranks(script, 2, tmp_path, *TINY, *more, timeout=240)
    losses = {precision: losses_of(tmp_path / precision) for precision in PRECISIONS}
    for precision in PRECISIONS:
        assert losses[precision][-1] < losses[precision][0] - 0.3, precision
        assert losses[precision][0] == pytest.approx(losses["32-true"][0], abs=0.05), precision


def test_a_batch_that_cannot_be_split_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="--batch-size 5 cannot be split over 2 processes: choose a multiple of 2"):
        run_ranks(SCRIPT, 2, *arguments(tmp_path, "--batch-size", 5, "--strategy", "ddp"))


def test_resuming_without_a_checkpoint_is_refused(main: Main, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        main(arguments(tmp_path, "--resume"))
