"""The place of this process among all processes. Only this module reads the launcher's environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from nucleate.cluster import started_rank
from nucleate.errors import ConfigurationError

#: The environment variable with the launcher's name for its run, which torch's elastic agent sets for every rank.
RUN_ID = "TORCHELASTIC_RUN_ID"


@dataclass(frozen=True, slots=True)
class Environment:
    """The place of this process among all processes.

    Attributes:
        launcher: The program that started the processes: `"torchrun"`; `"nucleate"` for `Runtime(devices=N)`; or
            `"python"` for a process that no launcher started.
        world_size: The number of processes.
        global_rank: The number of this process among all processes.
        local_rank: The number of this process among those of its node.
        local_world_size: The number of processes on this node.
        node_rank: The number of this node among all nodes.
        restart_count: The number of times that the launcher has restarted this group of processes after a failure.
        agent_store: `"host:port"` of the store that the launcher's agent keeps for its workers, or `""`.
        store_address: `"host:port"` of the store by which the processes find each other, or `""`.
        run_id: The launcher's name for the run of all its processes, or `""` for processes that were started by hand.
        is_planned: Whether the ranks do not run yet: this process starts them when they are needed. The place is then
            that of rank 0.
    """

    launcher: str = "python"
    world_size: int = 1
    global_rank: int = 0
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    restart_count: int = 0
    agent_store: str = ""
    store_address: str = ""
    is_planned: bool = False
    run_id: str = ""

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
        restarts = started_rank.RESTARTS if started_rank.FOLDER in env else "TORCHELASTIC_RESTART_COUNT"
        local_world_size = _number(env, "LOCAL_WORLD_SIZE", world_size)
        address = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        return cls(
            launcher="nucleate" if started_rank.FOLDER in env else "torchrun",
            world_size=world_size,
            global_rank=rank,
            local_rank=_number(env, "LOCAL_RANK", rank % local_world_size),
            local_world_size=local_world_size,
            node_rank=_number(env, "GROUP_RANK", rank // local_world_size),
            restart_count=_number(env, restarts, 0),
            agent_store=address if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "",
            store_address=address,
            run_id=env.get(RUN_ID, ""),
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
