"""Copies to the device overlap with work of the host: while a file is read, and while a training step runs."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nucleate import Runtime
from nucleate.deferred import ElementSource
from nucleate.deferred.elements.element_source import fill_from
from nucleate.devices.staging import BUFFER_BYTES
from tests.gpu.device import DEVICE_TYPE, device, only_on_gpu, synchronize

pytestmark = [pytest.mark.cuda, only_on_gpu("overlap")]

NUM_ROUNDS = 7
NUM_BUFFERS = 24
NUMEL = NUM_BUFFERS * BUFFER_BYTES // 4


class Paced(ElementSource):
    """Reads nothing, at the speed of a source that takes a fixed time for each buffer."""

    dtype = torch.float32
    shape = (NUMEL,)

    def __init__(self, seconds_per_byte: float) -> None:
        self._seconds_per_byte = seconds_per_byte

    def read(self, start: int, out: Tensor) -> None:
        time.sleep(out.nbytes * self._seconds_per_byte)

    def order(self, start: int) -> tuple[int, int]:
        return 0, start

    def describe(self) -> str:
        return "paced"


class Clock:
    """Measures seconds between its start and the end of all work of the device."""

    def __enter__(self) -> Clock:
        synchronize()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        synchronize()
        self.seconds = time.perf_counter() - self._started


def copy_each_buffer(source: Tensor, target: Tensor) -> None:
    """Copy as many buffers as the tests do, one after the other."""
    numel = source.numel()
    for first in range(0, target.numel(), numel):
        part = target[first : first + numel]
        part.copy_(source[: part.numel()], non_blocking=True)
        synchronize()


def test_copies_overlap_with_a_source_as_slow_as_they_are(record_property: Any) -> None:
    """Loading from a source as slow as the bus takes at most 0.8 of reading plus copying; 0.5 is the ideal."""
    pinned = torch.zeros(BUFFER_BYTES // 4, pin_memory=True)
    target = torch.empty(NUMEL, device=device())
    copy_each_buffer(pinned, target)
    with Clock() as clock:
        copy_each_buffer(pinned, target)
    # A sleep cannot be much shorter than a millisecond: a slower source than a fast bus hides less, and is no harm.
    paced = Paced(max(clock.seconds / target.nbytes, 0.0005 / BUFFER_BYTES))
    fill_from(target, paced)
    ratios = []
    for _ in range(NUM_ROUNDS):
        with Clock() as reading:
            for _ in range(NUM_BUFFERS):
                paced.read(0, pinned)
        with Clock() as copying:
            copy_each_buffer(pinned, target)
        with Clock() as loading:
            fill_from(target, paced)
        ratios.append(loading.seconds / (reading.seconds + copying.seconds))
    record_property("loading / (reading + copying)", round(statistics.median(ratios), 3))
    assert statistics.median(ratios) <= 0.8, ratios


def test_a_file_is_not_loaded_slower_than_read_and_copied(tmp_path: Path, record_property: Any) -> None:
    """A file of the page cache arrives no later than read by nucleate on the host and then copied from there."""
    names = [f"{number}.weight" for number in range(8)]
    save_file({name: torch.rand(4096, 6144) for name in names}, tmp_path / "m.safetensors")

    def load(accelerator: str) -> nn.Module:
        runtime = Runtime(accelerator=accelerator, strategy="single_device")
        with runtime.init_module(empty_init=True):
            model = nn.Sequential(*(nn.Linear(6144, 4096, bias=False) for _ in names))
        runtime.load_raw(tmp_path / "m.safetensors", model)
        runtime.setup(model)
        return model

    pinned = torch.zeros(BUFFER_BYTES // 4, pin_memory=True)
    target = torch.empty(8 * 4096 * 6144, device=device())
    load(DEVICE_TYPE)
    load("cpu")
    ratios = []
    for _ in range(NUM_ROUNDS):
        with Clock() as reading:
            load("cpu")
        with Clock() as copying:
            copy_each_buffer(pinned, target)
        with Clock() as loading:
            load(DEVICE_TYPE)
        ratios.append(loading.seconds / (reading.seconds + copying.seconds))
    record_property("loading / (reading + copying)", round(statistics.median(ratios), 3))
    assert statistics.median(ratios) <= 1, ratios


def test_batches_of_a_data_loader_are_copied_without_waiting() -> None:
    """The next batch is handed out, and its copy is queued, while the device still works on the last one."""
    runtime = Runtime(accelerator=DEVICE_TYPE, strategy="single_device")
    data = [torch.full((256, 1024), float(number)) for number in range(6)]
    loader = runtime.setup_dataloaders(DataLoader(data, batch_size=1, pin_memory=True))
    batches = iter(loader)
    first = next(batches)
    assert first.device == device()
    synchronize()
    for number in range(1, 4):
        # About a tenth of a second, whatever clock the device has.
        torch.cuda._sleep(200_000_000)
        working = torch.Event(device=device())
        working.record(torch.accelerator.current_stream(device()))
        batch = next(batches)
        assert not working.query(), "the batch was handed out only when the device had finished its work"
        assert (batch == number).all()
