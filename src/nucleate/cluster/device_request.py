"""The request for processes and devices: the arguments `devices` and `num_nodes` of a `Runtime`."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from nucleate.cluster.environment import Environment
from nucleate.cluster.restarts import check_max_restarts
from nucleate.errors import ConfigurationError, name_list

_ALLOWED = (
    "It may be 'auto', a number of processes for each node, -1 for one process on each device, or the indices of "
    "devices, such as [0, 1] or '0,1'"
)


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """The number of processes on each node, and the device of each.

    Attributes:
        devices: The argument of the `Runtime`, for messages.
        num: The number of processes on each node; None leaves it to the launcher, and means one without a launcher.
        indices: The index of each process's device, by local rank; None means the local rank itself.
        takes_all: Whether every device of the node gets a process.
        num_nodes: The number of nodes.
        max_restarts: The number of times that all processes start again after a failure.
    """

    devices: Any = "auto"
    num: int | None = None
    indices: tuple[int, ...] | None = None
    takes_all: bool = False
    num_nodes: int = 1
    max_restarts: int = 0

    @classmethod
    def parse(
        cls, devices: int | str | Sequence[int] | None = "auto", num_nodes: int = 1, max_restarts: int = 0
    ) -> Self:
        """Read the arguments of a `Runtime`.

        Args:
            devices: `"auto"` or None; a number, as an integer or as text; -1; or indices, as a sequence or as text with
                a comma.
            num_nodes: The number of nodes.
            max_restarts: The number of restarts.

        Raises:
            ConfigurationError: A value is not allowed.
        """
        if isinstance(num_nodes, bool) or not isinstance(num_nodes, int) or num_nodes < 1:
            raise ConfigurationError(f"num_nodes={num_nodes!r} must be an integer of at least 1.")
        check_max_restarts(max_restarts)
        read = _read(devices)
        make = partial(cls, devices, num_nodes=num_nodes, max_restarts=max_restarts)
        if read is None or read == -1:
            return make(takes_all=read == -1)
        if isinstance(read, int):
            if read < 1:
                raise ConfigurationError(f"devices={devices!r} is not a number of processes. {_ALLOWED}.")
            return make(num=read)
        twice = sorted({index for index in read if read.count(index) > 1})
        if twice:
            raise ConfigurationError(
                f"devices={devices!r} names {name_list(map(str, twice))} twice. Each process has a device of its own: "
                "name each device once."
            )
        return make(num=len(read), indices=read)

    def resolve(self, found: Environment, count: Callable[[], int], is_shared: bool) -> Environment:
        """Return the environment of this process: as a launcher started it, or with ranks that have yet to start.

        Args:
            found: The environment that this process has found.
            count: Returns the number of devices of this node.
            is_shared: Whether any number of processes can share the device, as on a CPU.

        Raises:
            ConfigurationError: A launcher started another number of processes, the node has too few devices, or several
                nodes are asked for without a launcher. Or restarts are asked for, and this process starts no others.
        """
        if found.launcher != "python":
            self._check_started(found)
            self._check_devices(self.num or 1, count, is_shared)
            return found
        if self.takes_all:
            # Processes share a CPU: it is one device.
            num = 1 if is_shared else max(1, count())
        else:
            num = self.num or 1
        if self.num_nodes > 1:
            raise ConfigurationError(
                f"num_nodes={self.num_nodes} needs a launcher on each node, and this process was started without one. "
                f"Start the script on each node with: torchrun --nnodes {self.num_nodes} --nproc-per-node {num} "
                f"--rdzv-backend c10d --rdzv-endpoint HOST:PORT {sys.argv[0] or 'script.py'}"
            )
        self._check_devices(num, count, is_shared)
        if num == 1 and self.max_restarts > 0:
            raise ConfigurationError(
                f"max_restarts={self.max_restarts} needs ranks that this process starts, and it starts none. Ask for "
                f"several with devices=2 or more, or start the script with: torchrun --max-restarts {self.max_restarts}"
            )
        return found if num == 1 else replace(found, world_size=num, local_world_size=num, is_planned=True)

    def index(self, local_rank: int) -> int:
        """Return the index of the device of a process.

        Args:
            local_rank: The number of the process among those of its node.
        """
        return local_rank if self.indices is None else self.indices[local_rank]

    def _check_started(self, found: Environment) -> None:
        """Refuse a request for another number of processes than a launcher started."""
        wanted = self.num or found.local_world_size
        asked = self.num is not None or self.num_nodes != 1
        if asked and (wanted, self.num_nodes) != (found.local_world_size, found.num_nodes):
            raise ConfigurationError(
                f"devices={self.devices!r} and num_nodes={self.num_nodes} ask for {wanted * self.num_nodes} processes, "
                f"but {found.launcher} started {found.world_size} ({found.local_world_size} on this node). Make the "
                "numbers agree, or leave both arguments at their defaults."
            )

    def _check_devices(self, num: int, count: Callable[[], int], is_shared: bool) -> None:
        """Refuse more processes than devices, and indices of devices that the node does not have."""
        if is_shared or (num == 1 and self.indices is None):
            return
        there = count()
        absent = [str(index) for index in self.indices or () if index >= there]
        if absent:
            raise ConfigurationError(
                f"devices={self.devices!r} names {name_list(absent)}, but this node has {there} of the accelerator's "
                f"devices. Give indices below {there}."
            )
        if num > there:
            raise ConfigurationError(
                f"devices={self.devices!r} asks for {num} processes, but this node has {there} of the accelerator's "
                f"devices. Ask for at most {there}, or use accelerator='cpu', which any number of processes can share."
            )


def _read(devices: Any) -> int | tuple[int, ...] | None:
    """Return a number, indices, or None for `"auto"`.

    Raises:
        ConfigurationError: The value is of another kind.
    """
    wrong = ConfigurationError(f"devices={devices!r} cannot be read. {_ALLOWED}.")
    if devices is None:
        return None
    if isinstance(devices, str):
        text = devices.strip()
        if text.lower() == "auto":
            return None
        if "," in text:
            parts = [part.strip() for part in text.removesuffix(",").split(",")]
            if not all(part.isdecimal() for part in parts):
                raise wrong
            return tuple(map(int, parts))
        if not text.removeprefix("-").isdecimal():
            raise wrong
        return int(text)
    if isinstance(devices, (bool, bytes, bytearray)):
        raise wrong
    if isinstance(devices, Sequence):
        indices = tuple(map(_index, devices))
        if not indices or None in indices:
            raise wrong
        return indices  # type: ignore[return-value]
    try:
        return operator.index(devices)
    except TypeError:
        raise wrong from None


def _index(value: object) -> int | None:
    """Return a device's index, or None if the value is not one."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    index = operator.index(value)
    return index if index >= 0 else None
