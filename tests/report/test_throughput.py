from __future__ import annotations

from typing import Any

import pytest
import torch

from nucleate import Runtime
from nucleate.devices.peak_flops import peak_flops
from nucleate.errors import ConfigurationError, UsageError
from nucleate.report import Throughput, ThroughputMonitor


def test_rates_are_those_of_the_window() -> None:
    meter = Throughput(available_flops=100.0, window_size=3, world_size=2)
    for step, time in enumerate((0.0, 10.0, 11.0, 14.0)):
        meter.update(time=time, batches=step, samples=4 * step, lengths=40 * step, flops=60.0)
    assert meter.compute() == {
        "time": 14.0,
        "batches": 3,
        "samples": 12,
        "lengths": 120,
        "device/batches_per_sec": 0.5,
        "batches_per_sec": 1.0,
        "device/samples_per_sec": 2.0,
        "samples_per_sec": 4.0,
        "device/items_per_sec": 20.0,
        "items_per_sec": 40.0,
        "device/flops_per_sec": 30.0,
        "flops_per_sec": 60.0,
        "device/mfu": 0.3,
    }


def test_the_rates_are_fabrics() -> None:
    pytest.importorskip("lightning_fabric")
    from lightning_fabric.utilities.throughput import Throughput as Fabrics

    ours, theirs = (cls(available_flops=50.0, window_size=4, world_size=1) for cls in (Throughput, Fabrics))
    for step in range(1, 8):
        for meter in (ours, theirs):
            meter.update(time=step**1.5, batches=step, samples=3 * step, lengths=30 * step, flops=7)
    assert ours.compute() == pytest.approx(theirs.compute())


def test_before_the_window_is_full_there_are_totals_only() -> None:
    meter = Throughput(window_size=3)
    meter.update(time=1.0, batches=1, samples=2)
    meter.update(time=2.0, batches=2, samples=4)
    assert meter.compute() == {"time": 2.0, "batches": 2, "samples": 4}
    meter.reset()
    with pytest.raises(UsageError, match="no update"):
        meter.compute()


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ({"time": 1.0, "batches": 2, "samples": 4}, "time is 1.0"),
        ({"time": 2.0, "batches": 0, "samples": 4}, "batches is 0"),
        ({"time": 2.0, "batches": 2, "samples": 4, "flops": 1.0}, "flops came in some"),
    ],
)
def test_totals_that_go_back_are_refused_and_not_noted(update: dict[str, Any], words: str) -> None:
    meter = Throughput(window_size=2)
    meter.update(time=1.0, batches=1, samples=2)
    with pytest.raises(UsageError, match=words):
        meter.update(**update)
    meter.update(time=3.0, batches=2, samples=4)
    assert meter.compute()["device/batches_per_sec"] == 0.5


@pytest.mark.parametrize("options", [{"window_size": 1}, {"world_size": 0}])
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Throughput(**options)


def test_a_monitor_logs_by_the_runtime() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[tuple[dict[str, Any], int]] = []

        def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
            self.seen.append((metrics, step))

    recorder = Recorder()
    monitor = ThroughputMonitor(Runtime(accelerator="cpu", loggers=recorder), window_size=2)
    assert monitor.available_flops is None
    for step in range(1, 4):
        monitor.update(time=float(step), batches=step, samples=8 * step, flops=5)
    assert monitor.compute_and_log()["device/flops_per_sec"] == 5.0
    monitor.compute_and_log(step=7)
    assert [step for _, step in recorder.seen] == [0, 7]
    assert recorder.seen[0][0]["device/samples_per_sec"] == 8.0


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989.4e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, True, 156e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, False, 19.5e12),
        ("NVIDIA L4", torch.float16, False, 121e12),
        ("NVIDIA A10G", torch.float16, False, None),
        ("NVIDIA H100 PCIe", torch.int8, False, None),
        ("Another device", torch.float32, False, None),
    ],
)
def test_a_devices_peak_is_found_by_the_words_of_its_name(
    name: str, dtype: torch.dtype, tf32: bool, expected: float | None
) -> None:
    assert peak_flops(name, dtype, tf32) == expected
