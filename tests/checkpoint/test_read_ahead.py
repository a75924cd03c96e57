"""Files that are read ahead come into the page cache by themselves."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nucleate import Runtime
from nucleate.checkpoint.stored import read_ahead
from nucleate.checkpoint.stored.read_ahead import ReadAhead
from tests.checkpoint.page_cache import cached_pages, drop

SIZE = 20 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(SIZE // 4096, 1024)}, path)
    drop(path)
    return path


def is_cached(path: Path) -> bool:
    return cached_pages(path) == -(-path.stat().st_size // 4096)


def wait_until_cached(path: Path, timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while not is_cached(path) and time.monotonic() < deadline:
        time.sleep(0.02)
    return is_cached(path)


def running() -> int:
    return sum(thread.name == "nucleate-read-ahead" for thread in threading.enumerate())


def test_a_file_comes_into_the_cache_though_it_is_closed(path: Path) -> None:
    def comes() -> bool:
        drop(path)
        with open(path, "rb") as file:
            ReadAhead().start(file.fileno(), path.stat().st_size)
        return wait_until_cached(path, timeout_s=5)

    # The system may decline an advice, or drop the pages again, while other processes want the memory.
    assert any(comes() for _ in range(6))


def test_each_byte_is_asked_for_in_steps_that_every_disk_takes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, length, advice: asked.append((offset, length)))
    before = running()
    with open(path, "rb") as file:
        ReadAhead().start(file.fileno(), SIZE)
    deadline = time.monotonic() + 20
    while running() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [offset for offset, _ in asked] == list(range(0, SIZE, 128 << 10))
    assert {length for _, length in asked} == {128 << 10}


def test_its_thread_ends_and_starts_again(path: Path) -> None:
    before = running()
    ahead = ReadAhead()
    for _ in range(2):
        drop(path)
        with open(path, "rb") as file:
            ahead.start(file.fileno(), SIZE)
        deadline = time.monotonic() + 20
        while running() > before and time.monotonic() < deadline:
            time.sleep(0.02)
        assert running() == before


def test_what_does_not_fit_into_memory_is_left_to_the_system(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "available_bytes", lambda: SIZE)
    before = running()
    with open(path, "rb") as file:
        ReadAhead().start(file.fileno(), SIZE)
    assert running() == before
    assert not is_cached(path)


def test_a_model_whose_weights_lie_in_the_file_is_read_ahead(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(accelerator="cpu")
    with runtime.init_module(empty_init=True):
        model = nn.Linear(1024, SIZE // 4096, bias=False)
    runtime.load_raw(path, model, mmap=True)
    asked: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(ReadAhead, "start", lambda self, descriptor, size_bytes: asked.append(size_bytes))
        model = runtime.setup(model)
    assert asked == [path.stat().st_size]
    assert bool((model.weight == 1).all())
