"""The place of this process among all processes. Only this module reads the launcher's environment variables."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from nucleate.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Environment:
    """The place of this process among all processes.

    Attributes:
        launcher: The program that started the processes: `"torchrun"`, or `"python"` for a single process.
        world_size: The number of processes.
        global_rank: The number of this process among all processes.
        local_rank: The number of this process among those of its node.
        local_world_size: The number of processes on this node.
        node_rank: The number of this node among all nodes.
        restart_count: The number of times that the launcher has restarted this group of processes after a failure.
        agent_store: `"host:port"` of the store that the launcher's agent keeps for its workers, or `""`.
    """

    launcher: str = "python"
    world_size: int = 1
    global_rank: int = 0
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    restart_count: int = 0
    agent_store: str = ""

    @property
    def num_nodes(self) -> int:
        """The number of nodes, if each has as many processes as this one."""
        return max(1, self.world_size // self.local_world_size)

    @classmethod
    def detect(cls, variables: Mapping[str, str] | None = None) -> Environment:
        """Read the environment: torchrun's variables where they are set, else a single process.

        Args:
            variables: Read these instead of `os.environ`.

        Raises:
            ConfigurationError: Only some of torchrun's variables are set, or one is not a number.
        """
        env = os.environ if variables is None else variables
        required = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if "RANK" not in env or "WORLD_SIZE" not in env:
            return cls()
        missing = [name for name in required if name not in env]
        if missing:
            raise ConfigurationError(
                f"RANK and WORLD_SIZE are set but not {' and '.join(missing)}, so the processes cannot find "
                "each other. Start the script with torchrun, or unset RANK and WORLD_SIZE for a single process."
            )
        rank, world_size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
        local_world_size = _number(env, "LOCAL_WORLD_SIZE", world_size)
        return cls(
            launcher="torchrun",
            world_size=world_size,
            global_rank=rank,
            local_rank=_number(env, "LOCAL_RANK", rank % local_world_size),
            local_world_size=local_world_size,
            node_rank=_number(env, "GROUP_RANK", rank // local_world_size),
            restart_count=_number(env, "TORCHELASTIC_RESTART_COUNT", 0),
            agent_store=(
                f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
                if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
                else ""
            ),
        )

    def check_request(self, devices: int | str, num_nodes: int) -> None:
        """Refuse a request for another number of processes than were started.

        Args:
            devices: The number of processes that each node must have; `"auto"` for any number.
            num_nodes: The number of nodes that must run.

        Raises:
            ConfigurationError: A number is invalid, or another number of processes or nodes was started.
        """
        if isinstance(num_nodes, bool) or not isinstance(num_nodes, int) or num_nodes < 1:
            raise ConfigurationError(f"num_nodes={num_nodes!r} must be an integer of at least 1.")
        text = str(devices)
        if text != "auto" and not (text.isdecimal() and int(text) >= 1):
            raise ConfigurationError(
                f"devices={devices!r} must be 'auto' or the number of processes per node, at least 1."
            )
        wanted = self.local_world_size if text == "auto" else int(text)
        if self.launcher == "python" and wanted * num_nodes > 1:
            nodes = f" --nnodes {num_nodes}" if num_nodes > 1 else ""
            raise ConfigurationError(
                f"devices={devices!r} on num_nodes={num_nodes} needs {wanted * num_nodes} processes, but this is a "
                f"single process. Start the script with: torchrun{nodes} --nproc-per-node {wanted} "
                f"{sys.argv[0] or 'script.py'}"
            )
        asked = text != "auto" or num_nodes != 1
        if self.launcher != "python" and asked and (wanted, num_nodes) != (self.local_world_size, self.num_nodes):
            raise ConfigurationError(
                f"devices={devices!r} and num_nodes={num_nodes} ask for {wanted * num_nodes} processes, but "
                f"{self.launcher} started {self.world_size} ({self.local_world_size} on this node). Make the numbers "
                "agree, or leave both arguments at their defaults."
            )


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ConfigurationError(
            f"the environment variable {name} is {text!r}, which is not a number. torchrun sets it; unset it "
            "if you did not mean to start several processes."
        ) from None
