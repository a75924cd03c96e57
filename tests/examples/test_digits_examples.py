"""The examples of single jobs, 04 to 09: each does its job as well as it says, alone and on two ranks."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.multi.ranks import ROOT, fork_ranks, run_ranks

pytest.importorskip("sklearn")

EXAMPLES = ROOT / "examples"
#: Each example, options that make it quick, the words before its figure, and how large the figure must be then.
JOBS = {
    "04_image_classifier": (("--epochs", 4), "held-out accuracy", 0.95),
    "05_kfold": (("--folds", 3, "--epochs", 6), "accuracy over 3 folds:", 0.93),
    "06_gan": (("--epochs", 30), "held-out accuracy of reading by generated images:", 0.75),
    "07_meta_learning": (("--iterations", 300), "accuracy on new digits after training:", 0.75),
    "08_reinforcement_learning": (("--iterations", 12), "return after training:", 200),
    "09_trainer": (("--epochs", 5), "best held-out accuracy:", 0.94),
}
#: Options that make two ranks begin and end each job, without a figure worth a bound.
SHORT = {
    "04_image_classifier": ("--epochs", 1),
    "05_kfold": ("--folds", 3, "--epochs", 1),
    "06_gan": ("--epochs", 2),
    "07_meta_learning": ("--iterations", 10),
    "08_reinforcement_learning": ("--iterations", 2),
    "09_trainer": ("--epochs", 1),
}
WRITES = {"04_image_classifier": "digits.safetensors", "09_trainer": "trainer"}


def arguments(name: str, folder: Path, *more: object) -> list[str]:
    out = ["--out", folder / WRITES[name]] if name in WRITES else []
    return ["--accelerator", "cpu", *map(str, (*out, *more))]


def figure(printed: str, words: str) -> float:
    return float(re.findall(rf"{re.escape(words)} ([\d.]+)", printed)[-1])


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as python does for the script it runs


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name.partition("_")[2], EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", JOBS)
def test_it_does_its_job(name: str, on_path: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, words, at_least = JOBS[name]
    load(name).main(arguments(name, tmp_path, *options))
    assert figure(capsys.readouterr().out, words) > at_least
    assert [path.name for path in tmp_path.iterdir()] == ([WRITES[name]] if name in WRITES else [])


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        # Each job with one of the strategies, in turn.
        pytest.param(name, strategy, marks=() if place % 2 == other else pytest.mark.long)
        for place, name in enumerate(JOBS)
        for other, strategy in enumerate(("ddp", "fsdp"))
    ],
)
def test_two_ranks_do_the_same_job_and_one_of_them_prints(name: str, strategy: str, tmp_path: Path) -> None:
    _, words, _ = JOBS[name]
    # The first as users start it.
    start = run_ranks if (name, strategy) == ("04_image_classifier", "ddp") else fork_ranks
    command = arguments(name, tmp_path, *SHORT[name], "--strategy", strategy)
    printed = start(EXAMPLES / f"{name}.py", 2, *command, timeout=240).stdout
    assert figure(printed, words) >= 0
    assert sum(words in line for line in printed.splitlines()) == 1


def test_each_sample_is_held_out_once(on_path: None) -> None:
    parts = list(load("05_kfold").folds(11, 3))
    assert sorted(map(len, parts)) == [3, 4, 4]
    assert sorted(index for part in parts for index in part) == list(range(11))


def test_a_pole_that_nobody_balances_falls_and_a_new_one_stands(on_path: None) -> None:
    from cart_pole import CartPoles

    carts = CartPoles(3, torch.Generator().manual_seed(0))
    ended = torch.zeros(3, dtype=torch.bool)
    num_steps = 0
    while not ended.any():
        rewards, ended = carts.step(torch.ones(3, dtype=torch.long))
        num_steps += 1
        assert rewards.tolist() == [1, 1, 1]
    assert 5 < num_steps < 15, "a cart that is only pushed to the right loses its pole soon"
    assert (carts.states[ended].abs() <= 0.05).all()


def test_a_trainer_resumes_to_the_figures_of_an_uninterrupted_run(on_path: None, tmp_path: Path) -> None:
    main = load("09_trainer").main
    whole = main(arguments("09_trainer", tmp_path / "whole", "--epochs", 4))
    main(arguments("09_trainer", tmp_path / "parts", "--epochs", 2))
    resumed = main(arguments("09_trainer", tmp_path / "parts", "--epochs", 4, "--resume"))
    assert len(resumed.history) == 4
    assert resumed.history == whole.history


def test_a_trainer_stops_when_nothing_becomes_better(on_path: None, tmp_path: Path) -> None:
    trainer = load("09_trainer").main(arguments("09_trainer", tmp_path, "--epochs", 200))
    accuracies = [epoch["accuracy"] for epoch in trainer.history]
    assert len(accuracies) < 200
    assert max(accuracies[-5:]) <= max(accuracies[:-5])
