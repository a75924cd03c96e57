"""Saves in the background: what is saved is the state at the call, and no failure is lost."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nucleate import Runtime
from nucleate.checkpoint import save
from nucleate.checkpoint.disk.lock import SaveLock
from nucleate.checkpoint.save_job import SaveJob
from nucleate.checkpoint.saving.snapshot import Snapshot
from nucleate.checkpoint.writers.safetensors import SafetensorsWriter
from nucleate.cluster import Communicator
from nucleate.errors import CheckpointError
from tests.checkpoint.test_writer import PLACES
from tests.device import ACCELERATOR, equal

pytestmark = pytest.mark.usefixtures("factories_on_device")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before this event is set."""
    run, event = SaveJob.run, threading.Event()

    def late(job: SaveJob) -> None:
        assert event.wait(30)
        run(job)

    monkeypatch.setattr(SaveJob, "run", late)
    return event


@pytest.mark.parametrize(("name", "format"), PLACES)
def test_what_is_saved_is_the_state_at_the_call(
    tmp_path: Path, gate: threading.Event, name: str, format: str | None
) -> None:
    runtime = Runtime(accelerator=ACCELERATOR)
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone()
    numbers = [1, 2]
    handle = runtime.save(tmp_path / name, {"model": model, "numbers": numbers}, format=format, asynchronous=True)
    assert handle is not None
    with torch.no_grad():
        model.weight.zero_()
    numbers.append(3)
    assert not handle.done()
    assert not (tmp_path / name).exists()
    with pytest.raises(TimeoutError):
        handle.wait(timeout_s=0.01)
    gate.set()
    handle.wait()
    handle.wait()
    assert handle.done()
    assert os.listdir(tmp_path) == [name]
    if name == "c.pt":
        found = torch.load(tmp_path / name, weights_only=True)
        assert found["numbers"] == [1, 2]
        assert equal(found["model"]["weight"], before)
    elif name == "c.safetensors":
        assert equal(load_file(tmp_path / name)["model.weight"], before)
    elif format is None:
        rest = runtime.load(tmp_path / name)
        assert rest["numbers"] == [1, 2]
        assert equal(rest["model"]["weight"], before)


def test_what_can_be_refused_is_refused_at_the_call(tmp_path: Path, solo: Communicator) -> None:
    lock = SaveLock(tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="another save"):
        save(tmp_path / "c.pt", {"a": 1}, solo, asynchronous=True)
    lock.release()
    with pytest.raises(CheckpointError, match="cannot hold"):
        save(tmp_path / "c.pt", {"a": object()}, solo, asynchronous=True)
    assert os.listdir(tmp_path) == []


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, solo: Communicator, gate: threading.Event) -> None:
    first = save(tmp_path / "a.pt", {"a": 1}, solo, asynchronous=True)
    threading.Timer(0.2, gate.set).start()
    second = save(tmp_path / "b.pt", {"a": 1}, solo, asynchronous=True)
    assert first is not None
    assert second is not None
    assert first.done()
    second.wait()
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.pt"]


def failing(tmp_path: Path, solo: Communicator, monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:

        def fail(*args: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("nucleate.checkpoint.writers.slabs._pwrite", fail)
        handle = save(tmp_path / "a.pt", {"a": torch.ones(2)}, solo, asynchronous=True)
        assert handle is not None
        handle._thread.join()
    return handle


def test_a_failure_is_raised_by_waiting_and_then_forgotten(
    tmp_path: Path, solo: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = failing(tmp_path, solo, monkeypatch)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="No space left on device"):
            handle.wait()
    assert "failed" in repr(handle)
    assert os.listdir(tmp_path) == []
    save(tmp_path / "a.pt", {"a": torch.ones(2)}, solo)


def test_a_failure_that_nobody_waited_for_is_raised_by_the_next_save_once(
    tmp_path: Path, solo: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(tmp_path, solo, monkeypatch)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(tmp_path / "a.pt", {"a": torch.ones(2)}, solo)
    save(tmp_path / "a.pt", {"a": torch.ones(2)}, solo)


SCRIPT = """
import sys, time, torch
from unittest import mock
from nucleate import Runtime
from nucleate.checkpoint.writers import slabs

runtime = Runtime(accelerator="cpu")
write = slabs.write_tensors
def slowly(*args):
    time.sleep(0.5)
    if sys.argv[2] == "fails":
        raise OSError("the disk is gone")
    write(*args)
mock.patch.object(slabs, "write_tensors", slowly).start()
runtime.save(sys.argv[1], {"a": torch.ones(3), "b": torch.ones(50_000_000)}, asynchronous=True)
if sys.argv[2] == "raises":
    raise SystemExit(3)
"""


@pytest.mark.parametrize("how", ["ends", "raises", "fails"])
def test_the_interpreter_does_not_end_before_the_checkpoint_is_written(tmp_path: Path, how: str) -> None:
    path = tmp_path / "c.safetensors"
    run = subprocess.run([sys.executable, "-c", SCRIPT, path, how], capture_output=True, text=True, timeout=100)
    assert run.returncode == (3 if how == "raises" else 0)
    if how == "fails":
        assert "the disk is gone" in run.stderr
        assert os.listdir(tmp_path) == []
    else:
        assert run.stderr == ""
        assert load_file(path)["b"].sum() == 50_000_000


def test_the_copy_is_given_back_when_it_is_written(tmp_path: Path, solo: Communicator) -> None:
    handle = save(tmp_path / "c.pt", {"a": torch.ones(2)}, solo, asynchronous=True)
    assert handle is not None
    handle.wait()
    assert handle._work is None


def test_saves_from_several_threads_take_turns(tmp_path: Path, solo: Communicator) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(4):
                handle = save(tmp_path / f"{number}.safetensors", {"t": torch.ones(50)}, solo, asynchronous=True)
                assert handle is not None
                handle.wait()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(item.name for item in tmp_path.iterdir()) == [f"{number}.safetensors" for number in range(4)]


def test_a_failed_save_does_not_keep_the_copy_of_the_state(
    tmp_path: Path, solo: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[weakref.ref[Snapshot]] = []

    def failing(self: object, snapshot: Snapshot, *args: object) -> None:
        copies.append(weakref.ref(snapshot))
        raise CheckpointError("the disk is gone")

    monkeypatch.setattr(SafetensorsWriter, "write", failing)
    handle = save(tmp_path / "c.safetensors", {"t": torch.ones(50)}, solo, asynchronous=True)
    assert handle is not None
    with pytest.raises(CheckpointError, match="the disk is gone"):
        handle.wait()
    gc.collect()
    assert [copy() for copy in copies] == [None]
