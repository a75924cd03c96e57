"""Throughput of a training run over a window of its last steps, and its share of the device's peak."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from nucleate.devices import hooks_of
from nucleate.errors import ConfigurationError, UsageError


class Throughput:
    """A meter of batches, samples, items and floating point operations in a second.

    Each call of `update` gives the totals of this process since the start, and `compute` takes the difference between
    the last and the first update of the window. A device computes while the program goes on: read the loss, or
    synchronize the device, before you take the time.

    Args:
        available_flops: The peak of one device in floating point operations in a second. None leaves `mfu` out.
        world_size: The number of devices. With several, `compute` also returns the totals of all devices. They assume
            that every device does as much as this one.
        window_size: The number of updates in the window.
        separator: The text between `device` and the name of a metric of one device.

    Raises:
        ConfigurationError: `world_size` is less than 1, or `window_size` less than 2.

    Example:
        >>> throughput = Throughput(window_size=2, world_size=4)
        >>> throughput.update(time=1.0, batches=1, samples=8)
        >>> throughput.update(time=3.0, batches=2, samples=16)
        >>> throughput.compute()["device/samples_per_sec"], throughput.compute()["samples_per_sec"]
        (4.0, 16.0)
    """

    def __init__(
        self,
        available_flops: float | None = None,
        world_size: int = 1,
        window_size: int = 100,
        separator: str = "/",
    ) -> None:
        if world_size < 1:
            raise ConfigurationError(f"world_size={world_size!r} must be at least 1.")
        if window_size < 2:
            raise ConfigurationError(f"window_size={window_size!r} must be at least 2: it compares two updates.")
        self.available_flops = available_flops
        self.world_size = world_size
        self.separator = separator
        self._window: deque[dict[str, float]] = deque(maxlen=window_size)

    def update(
        self,
        *,
        time: float,
        batches: int,
        samples: int,
        lengths: int | None = None,
        flops: float | None = None,
    ) -> None:
        """Note the totals of this process after a step.

        Args:
            time: Seconds since the start.
            batches: Batches since the start.
            samples: Samples since the start.
            lengths: Items since the start, such as tokens. Give them in each update or in none.
            flops: Floating point operations since the last update, such as `measure_flops` returns for one batch. Give
                them in each update or in none.

        Raises:
            UsageError: A total is smaller than in the update before, the time has not moved on, or `lengths` or `flops`
                came in some updates only. Nothing has been noted.
        """
        new = {"time": time, "batches": batches, "samples": samples, "lengths": lengths, "flops": flops}
        given = {name: value for name, value in new.items() if value is not None}
        last = self._window[-1] if self._window else None
        if last is not None:
            if given.keys() != last.keys():
                differing = sorted(given.keys() ^ last.keys())
                raise UsageError(f"throughput: {' and '.join(differing)} came in some updates only. Give each in all.")
            back = [name for name in given if name != "flops" and given[name] < last[name]]
            if back or time <= last["time"]:
                name = back[0] if back else "time"
                raise UsageError(
                    f"throughput: {name} is {given[name]}, but it was {last[name]} in the update before. Give totals "
                    "since the start, or call reset() first."
                )
        self._window.append(given)

    def compute(self) -> dict[str, float]:
        """Return the totals, and the rates once the window is full.

        Returns:
            `time`, `batches`, `samples` and `lengths` in all. For one device: `device/batches_per_sec`,
            `device/samples_per_sec`, `device/items_per_sec`, `device/flops_per_sec` and `device/mfu`, the share of the
            peak. For several devices, the same without `device/` for all together, but not `mfu`.

        Raises:
            UsageError: There was no update yet.
        """
        if not self._window:
            raise UsageError("throughput: there was no update yet. Call update() after each step.")
        first, last = self._window[0], self._window[-1]
        metrics = {name: value for name, value in last.items() if name != "flops"}
        if len(self._window) < (self._window.maxlen or 0):
            return metrics
        elapsed_s = last["time"] - first["time"]
        names = {"batches": "batches", "samples": "samples", "lengths": "items"}
        rates = {names[key]: (last[key] - first[key]) / elapsed_s for key in names if key in last}
        if "flops" in last:
            # The operations of the first update came before the window began.
            rates["flops"] = (sum(update["flops"] for update in self._window) - first["flops"]) / elapsed_s
        for name, rate in rates.items():
            metrics[f"device{self.separator}{name}_per_sec"] = rate
            if self.world_size > 1:
                metrics[f"{name}_per_sec"] = rate * self.world_size
        if "flops" in rates and self.available_flops:
            metrics[f"device{self.separator}mfu"] = rates["flops"] / self.available_flops
        return metrics

    def reset(self) -> None:
        """Forget all updates, for example before the next part of a run."""
        self._window.clear()


class Logging(Protocol):
    """The parts of a `Runtime` that a monitor needs."""

    @property
    def device(self) -> torch.device:
        """The device of this process."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""

    @property
    def precision(self) -> Any:
        """The precision plugin."""

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write metrics."""


class ThroughputMonitor(Throughput):
    """A `Throughput` that knows the devices of a runtime, and logs.

    Args:
        runtime: The runtime.
        options: Arguments of `Throughput`. `available_flops` is known for some devices; see
            `DeviceHooks.peak_flops`.
    """

    def __init__(self, runtime: Logging, **options: Any) -> None:
        precision = runtime.precision
        dtype = getattr(precision, "compute_dtype", precision.dtype)
        options.setdefault("available_flops", hooks_of(runtime.device).peak_flops(runtime.device, dtype))
        super().__init__(world_size=runtime.world_size, **options)
        self._runtime = runtime
        self.step = -1

    def compute_and_log(self, step: int | None = None) -> dict[str, float]:
        """Write the metrics of `compute` by the runtime's loggers, and return them. Every rank may call this method.

        Args:
            step: The number of the step. None counts the calls.
        """
        self.step = self.step + 1 if step is None else step
        metrics = self.compute()
        self._runtime.log_dict(metrics, self.step)
        return metrics
