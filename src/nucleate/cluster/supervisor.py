"""The supervisor of ranks that this process starts, by torch's elastic agent, which torchrun uses too.

The agent starts the ranks, waits, and ends all of them if one fails or a signal comes. This module adds a free port, an
end within seconds, and one message about the first failure. It leaves this process as it was, since a notebook goes on.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from nucleate.cluster.parent import __file__ as PARENT
from nucleate.cluster.rank_end import RankEnd, first_failure
from nucleate.cluster.restarts import END_S, RanksFailed, Terms
from nucleate.cluster.started_rank import FOLDER, RESTARTS, SUPERVISOR

_POLL_S = 0.05
_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
_THREADS = "OMP_NUM_THREADS"
_PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


class Interrupted(Exception):  # noqa: N818 - nothing is wrong
    """A signal came, and all ranks have ended.

    Attributes:
        signal: The number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.signal = number


def run_command(command: Sequence[str], num: int, terms: Terms) -> None:
    """Run a command in several ranks, and wait for them.

    Args:
        command: The program and its arguments.
        num: The number of ranks.
        terms: The terms on which they end.

    Raises:
        RanksFailed: A rank failed.
        Interrupted: This process received a signal.
    """
    if os.name == "posix":
        # The small program binds the rank to this process, and becomes the command.
        program, options = sys.executable, ["-I", "-S", PARENT, str(os.getpid()), *command]
    else:
        program, options = command[0], list(command[1:])
    # The agent takes `$` for the beginning of a name.
    arguments = [option.replace("$", "$$") for option in options]
    terms.run(lambda count: _run(program, arguments, num, "spawn", terms.end_s, count))


def run_function(function: Callable[..., Any], argument: object, num: int, start_method: str, terms: Terms) -> Any:
    """Call a function in several ranks, and return rank 0's result.

    Args:
        function: A function at the top level of a module.
        argument: Its only argument.
        num: The number of ranks.
        start_method: A start method of multiprocessing.
        terms: The terms on which they end.

    Raises:
        RanksFailed: A rank failed.
        Interrupted: This process received a signal.
    """
    before = multiprocessing.active_children()
    try:
        return terms.run(lambda count: _run(function, [argument], num, start_method, terms.end_s, count))[0]
    finally:
        # A second signal interrupts the agent while it ends the ranks.
        for process in multiprocessing.active_children():
            if process not in before:
                process.kill()
                process.join()


def threads_per_rank(num: int) -> int | None:
    """Return the number of threads for each rank: the cores are divided among them. None leaves it to the user.

    Args:
        num: The number of ranks.
    """
    if os.environ.get(_THREADS):
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num)


def _run(
    entry: str | Callable[..., Any], arguments: list[Any], num: int, start_method: str, end_s: int, restart_count: int
) -> dict[int, Any]:
    """Run all ranks once.

    Each attempt has a store of its own. The agent's own restarts would keep one store, in which ranks that start again
    find the addresses of the dead ones, and the files of their ends.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nucleate-")))
        variables = stack.enter_context(_variables(folder, threads_per_rank(num), restart_count))
        stack.enter_context(_signals_kept())
        stack.enter_context(_quiet_agent())
        store = _make_store()
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num,
            logs_specs=DefaultLogsSpecs(log_dir=str(folder / "agent")),
            run_id=uuid.uuid4().hex,
            rdzv_endpoint=f"127.0.0.1:{store.port}",
            rdzv_backend="static",
            rdzv_configs={"rank": 0},
            max_restarts=0,
            monitor_interval=_POLL_S,
            start_method=start_method,
            shutdown_timeout=None if _PATIENCE in os.environ else end_s,
        )
        try:
            if callable(entry):
                entry, arguments = _call, [variables, entry, *arguments]
            results: dict[int, Any] = elastic_launch(config, entry)(*arguments)
            return results
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            raise RanksFailed(first_failure(codes, RankEnd.read(folder), num, END_S)) from None
        except SignalException as error:
            raise Interrupted(error.sigval) from None


def _call(variables: dict[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a rank, with the variables of this run.

    A fork server keeps the environment with which it began, in an earlier run or before the first one.
    """
    os.environ.update(variables)
    return function(*arguments)


def _make_store() -> Any:
    """Return a store on a free port. The agent's own store on this port shares the server."""
    import torch.distributed as dist

    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)  # type: ignore[attr-defined]


@contextmanager
def _variables(folder: Path, num_threads: int | None, restart_count: int) -> Iterator[dict[str, str]]:
    """Set the environment variables of the ranks, give them, and restore those of this process afterwards."""
    before = dict(os.environ)
    ours = {FOLDER: str(folder), SUPERVISOR: str(os.getpid()), RESTARTS: str(restart_count)}
    if num_threads is not None:
        ours[_THREADS] = str(num_threads)
    os.environ |= ours
    try:
        yield ours
    finally:
        for name in {*os.environ, *before}:
            if name not in before:
                del os.environ[name]
            elif os.environ.get(name) != before[name]:
                os.environ[name] = before[name]


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Restore the signal handlers of this process, which the agent replaces by its own."""
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """Keep the agent from logging what the message about the first failure says better."""
    names = [
        name
        for name in logging.Logger.manager.loggerDict
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing"))
    ]
    loggers = [logger for logger in map(logging.getLogger, names) if not logger.disabled]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger in loggers:
            logger.disabled = False
