"""The end of a training loop after SIGTERM, in one process: where it comes, what is saved, and what is refused."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nucleate import RandomState, Runtime
from nucleate.errors import CheckpointError, ConfigurationError, UsageError
from tests.device import ACCELERATOR, device

pytestmark = pytest.mark.usefixtures("own_handler")


@pytest.fixture
def own_handler() -> Iterator[None]:
    from nucleate.cluster import sigterm

    yield
    if sigterm._current is not None:
        sigterm._current.stop()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Run:
    """A small training run, whose state can be saved and loaded."""

    def __init__(self, on_sigterm: Any = "save", model: nn.Module | None = None) -> None:
        self.runtime = Runtime(accelerator=ACCELERATOR, on_sigterm=on_sigterm)
        torch.manual_seed(0)
        model = model or nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.model, self.optimizer = self.runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        self.state = {"model": self.model, "optimizer": self.optimizer, "random": RandomState(), "step": 0}
        self.losses: list[float] = []

    def step(self, batch: Tensor | None = None) -> None:
        loss = self.model(torch.randn(4, 3, device=device()) if batch is None else batch).square().mean()
        self.runtime.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.state["step"] += 1  # type: ignore[operator]


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def ends(action: Callable[[], object]) -> bool:
    with pytest.raises(SystemExit) as info:
        action()
    return bool(info.value.code == 143)


def steps(run: Run, num: int) -> None:
    for _ in range(num):
        run.step()


def test_a_loop_that_draws_its_batches_goes_on_with_the_same_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Run(None)
    steps(whole, 6)

    first = Run()
    first.runtime.save(tmp_path / "last", first.state)
    steps(first, 2)
    terminate()
    first.step()  # the signal comes inside of a step, which ends as usual
    assert ends(first.step)
    assert f"SIGTERM ended this run after 3 steps. It was saved as {tmp_path / 'last'}." in capsys.readouterr().err

    second = Run()
    second.runtime.load(tmp_path / "last", second.state)
    assert second.state["step"] == 3
    steps(second, 3)
    assert first.losses + second.losses == whole.losses


def epochs(run: Run, path: Path, num: int, stop_at: int = -1) -> None:
    """Train over a loader, with evaluations in between, and let the signal come in a step."""
    loader = run.runtime.setup_dataloaders(DataLoader(torch.arange(72.0).reshape(24, 3), batch_size=4, shuffle=True))  # type: ignore[arg-type]
    run.state["loader"] = loader
    if path.exists():
        run.runtime.load(path, run.state)
    run.runtime.save(path, run.state)
    while run.state["step"] < 6 * num:  # type: ignore[operator]
        for batch in loader:
            if run.state["step"] == stop_at:
                terminate()
            run.step(batch)
            # A forward in training mode that belongs to the same iteration.
            run.losses.append(run.model(batch).sum().item())


@pytest.mark.parametrize("stop_at", [2, 5])
def test_a_loop_over_a_loader_ends_where_it_asks_for_the_next_batch(tmp_path: Path, stop_at: int) -> None:
    whole = Run(None)
    epochs(whole, tmp_path / "whole", 2)
    first = Run()
    assert ends(lambda: epochs(first, tmp_path / "last", 2, stop_at))
    assert first.state["step"] == stop_at + 1
    second = Run(None)
    epochs(second, tmp_path / "last", 2)
    assert first.losses + second.losses == whole.losses


def test_a_loop_of_two_optimizers_ends_after_the_one_that_steps_last(tmp_path: Path) -> None:
    run = Run()
    other = run.runtime.setup_optimizers(torch.optim.SGD(run.model.parameters(), lr=0.1))

    def iteration() -> None:
        loss = run.model(torch.ones(2, 3, device=device())).sum()
        run.runtime.backward(loss)
        other.step()
        run.step()

    iteration()
    run.runtime.save(tmp_path / "last", run.state)
    terminate()
    iteration()
    assert ends(iteration)
    assert run.state["step"] == 2


def test_a_loop_that_never_asks_its_loader_again_ends_all_the_same() -> None:
    run = Run(lambda _: None)
    batches = iter(run.runtime.setup_dataloaders(DataLoader(torch.randn(24, 3), batch_size=4)))  # type: ignore[arg-type]
    batch = next(batches)
    terminate()
    assert ends(lambda: [run.step(batch) for _ in range(200)])
    assert 100 < len(run.losses) < 105


def test_only_a_forward_that_trains_the_model_ends_the_run(tmp_path: Path) -> None:
    run = Run()
    run.runtime.save(tmp_path / "last", run.state)
    terminate()
    run.step()
    nn.Linear(3, 3)(torch.ones(1, 3))
    with torch.no_grad():
        run.model(torch.ones(2, 3, device=device()))
    run.model.eval()
    run.model(torch.ones(2, 3, device=device()))
    run.model.train()
    assert ends(run.step)
    # The signal is ignored until the process has ended.
    terminate()


def test_a_save_after_the_last_step_is_not_made_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run()
    run.runtime.save(tmp_path / "last", run.state)
    terminate()
    run.step()
    run.runtime.save(tmp_path / "last", run.state)
    written = (tmp_path / "last").stat().st_ino
    assert ends(run.step)
    assert "The checkpoint" in capsys.readouterr().err
    assert (tmp_path / "last").stat().st_ino == written


def test_options_of_the_save_and_a_state_with_an_optimizer_count(tmp_path: Path) -> None:
    run = Run()
    run.runtime.save(tmp_path / "all.pt", run.state, asynchronous=True, keep_last=2)
    run.runtime.save(tmp_path / "weights.safetensors", run.model)
    terminate()
    run.step()
    assert ends(run.step)
    assert run.runtime.load(tmp_path / "all.pt")["step"] == 1


def test_a_function_is_called_instead_also_before_any_save() -> None:
    seen: list[Any] = []
    run = Run(lambda runtime: seen.append((runtime, len(run.losses))))
    terminate()
    run.step()
    assert ends(run.step)
    assert seen == [(run.runtime, 1)]


def test_a_dict_that_nobody_keeps_is_not_saved_with_an_old_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run()
    run.runtime.save(tmp_path / "last", {"model": run.model, "optimizer": run.optimizer, "step": 0})
    with pytest.warns(UserWarning, match="step=0 could not follow the training"):
        run.step()
    terminate()
    run.step()
    assert ends(run.step)
    assert "Nothing was saved, because step of the last save" in capsys.readouterr().err


def test_a_dict_that_is_made_anew_for_each_save_is_noticed_at_the_second(tmp_path: Path) -> None:
    run = Run()
    kept = []
    for step in range(2):
        state = {"model": run.model, "optimizer": run.optimizer, "step": step}
        kept.append(state)
        run.runtime.save(tmp_path / "last", state)
        if step == 0:
            run.step()
    with pytest.warns(UserWarning, match="step=1 could not follow the training"):
        run.step()


def test_sigterm_before_any_save_ends_at_once_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run()
    run.step()
    assert ends(terminate)
    assert "on_sigterm='save' repeats the last runtime.save, and there was none yet" in capsys.readouterr().err


def test_a_save_that_failed_is_not_repeated(tmp_path: Path) -> None:
    run = Run()
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "novel.txt").write_text("")
    with pytest.raises(CheckpointError, match="novel.txt"):
        run.runtime.save(tmp_path / "last", run.state)
    assert ends(terminate)


def test_a_fork_of_the_process_does_not_wait_for_a_step(tmp_path: Path) -> None:
    run = Run()
    run.runtime.save(tmp_path / "last", run.state)
    pid = os.fork()
    if pid == 0:
        terminate()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def test_the_newest_runtime_has_the_signal(tmp_path: Path) -> None:
    before, run = Run(), Run()
    before.runtime.save(tmp_path / "before", before.state)
    assert ends(terminate)
    run.runtime.save(tmp_path / "last", run.state)
    terminate()
    steps(before, 3)
    run.step()
    assert ends(run.step)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("load", "on_sigterm='load' must be None, 'save', or a function"),
        (True, "on_sigterm=True must be None, 'save', or a function"),
        (lambda: None, "must take one argument, the runtime: too many positional arguments"),
    ],
)
def test_another_argument_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Runtime(accelerator=ACCELERATOR, on_sigterm=value)


def test_another_thread_cannot_launch() -> None:
    errors: list[BaseException] = []

    def launch() -> None:
        try:
            Runtime(accelerator=ACCELERATOR, on_sigterm="save").launch()
        except UsageError as error:
            errors.append(error)

    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    assert "on_sigterm needs the main thread" in str(errors)
