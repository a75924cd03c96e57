"""The start of the ranks that `Runtime(devices=N)` asks for, where no launcher has started them.

Without a function, the script runs again in each rank. With a function, the ranks run that function. This module
chooses the way; `cluster/supervisor.py` runs the ranks and waits for them.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch

from nucleate.errors import RankExitError, RankFailedError, UsageError

if TYPE_CHECKING:
    from nucleate.accelerators.base import Accelerator
    from nucleate.cluster.restarts import RanksFailed, Terms
    from nucleate.strategies.base import Strategy

#: The interrupt of Ctrl-C and its like: the exit code is this number and that of the signal.
_SIGNALLED = 128


class Startable(Protocol):
    """The parts of a `Runtime` that this module uses."""

    @property
    def accelerator(self) -> Accelerator: ...
    @property
    def strategy(self) -> Strategy: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def world_size(self) -> int: ...

    @property
    def _settings(self) -> dict[str, Any]:
        """The arguments of the `Runtime`."""

    def _renew(self) -> None:
        """Find the place of this process anew."""


@dataclass(frozen=True)
class _Job:
    """The work of every rank, as it travels to it."""

    supervisor: int
    start_method: str
    num_threads: int | None
    work: Any


def start_script(runtime: Startable) -> NoReturn:
    """Run the script of this process again in each rank, wait for the ranks, and end this process with their exit code.

    Args:
        runtime: The runtime that needs its ranks.

    Raises:
        UsageError: The script cannot be run again, or the strategy's start method needs a function.
        SystemExit: The ranks have ended.
    """
    from nucleate.cluster.command import command_again
    from nucleate.cluster.restarts import RanksFailed
    from nucleate.cluster.supervisor import Interrupted, run_command

    asked = f"devices={runtime.world_size}"
    method = runtime.strategy.start_method
    if method not in (None, "popen"):
        raise UsageError(
            f"start_method={method!r} starts processes that run a function, and `launch` got no function. Call "
            "runtime.launch(main), which calls main(runtime) in each process, before any other method that needs the "
            "processes. Or leave out the start method, and the script runs again in each process."
        )
    _refuse_unguarded()
    command = command_again(asked)
    _prepare()
    code = 0
    try:
        run_command(command, runtime.world_size, _terms(runtime))
    except RanksFailed as error:
        sys.stderr.write(f"{error}\n")
        code = error.failure.exit_code
    except Interrupted as error:
        code = _SIGNALLED + error.signal
    raise SystemExit(code)


def start_function(
    runtime: Startable, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Call `function(runtime, *args, **kwargs)` in each rank, and return rank 0's result.

    Args:
        runtime: The runtime. Each rank has one with the same settings.
        function: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Raises:
        RankFailedError: The function raised an error on a rank. All ranks have ended.
        RankExitError: A rank was killed, or ended with an exit code of its own.
        UsageError: The function, its arguments or its result cannot be sent to another process.
    """
    from nucleate.cluster import forking
    from nucleate.cluster.restarts import RanksFailed
    from nucleate.cluster.supervisor import Interrupted, run_function, threads_per_rank

    if runtime.strategy.start_method == "popen":
        start_script(runtime)
    _refuse_unguarded()
    num_threads = threads_per_rank(runtime.world_size)
    method, work = _choose_method(runtime, function), (runtime, function, args, dict(kwargs))
    if method == "fork" and not forking.release_threads():
        num_threads = 1
    job = _Job(os.getpid(), method, num_threads, work if method == "fork" else _pickled(work))
    _prepare()
    failure = None
    try:
        return pickle.loads(run_function(_run_rank, job, runtime.world_size, method, _terms(runtime)))
    except RanksFailed as error:
        failure = _error_of(error)
    except Interrupted as error:
        number = error.signal
    if failure is not None:
        # Out of the block: the error that a notebook keeps has no context, whose frames hold the agent and its store.
        raise failure
    # The handlers of this process are in place again: Ctrl-C is a KeyboardInterrupt here.
    signal.raise_signal(number)
    raise SystemExit(_SIGNALLED + number)


def _choose_method(runtime: Startable, function: Callable[..., Any]) -> str:
    """Return the start method for a function.

    Forking takes no time and sends nothing, but a fork cannot use an accelerator that this process has used.

    Raises:
        UsageError: The processes cannot be started in this way, or in any way.
    """
    from nucleate.cluster.command import program_file

    method, kind = runtime.strategy.start_method, runtime.device.type
    is_used = kind != "cpu" and runtime.accelerator.is_initialized(kind)
    can_fork = "fork" in multiprocessing.get_all_start_methods() and not is_used
    if method is None:
        if program_file() is None:
            method = "fork"  # Other methods could not find the functions of an interactive session.
        else:
            # macOS does not allow forks to use all of its libraries.
            method = "fork" if can_fork and kind == "cpu" and sys.platform == "linux" else "spawn"
    if method == "fork" and not can_fork:
        reason = f"this process has used {kind} already" if is_used else f"{sys.platform} does not fork processes"
        raise UsageError(
            f"`launch` cannot fork processes for this function: {reason}. Call `launch` before anything uses the "
            "device, or put the function into a script and use start_method='spawn'."
        )
    if method != "fork" and getattr(function, "__module__", None) == "__main__" and program_file() is None:
        name = getattr(function, "__qualname__", type(function).__qualname__)
        raise UsageError(
            f"start_method={method!r} starts new processes, and they cannot find `{name}`: it was defined in an "
            "interactive session, a notebook or a program from a pipe, which new processes cannot import. Use "
            "start_method='fork', or put the function into a module and import it."
        )
    return method


def _terms(runtime: Startable) -> Terms:
    from nucleate.cluster.restarts import END_S, SAVE_S, Terms

    settings = runtime._settings
    return Terms(settings["max_restarts"], END_S if settings["on_sigterm"] is None else SAVE_S)


def _refuse_unguarded() -> None:
    """Refuse to start ranks while the script is imported by one of them.

    Raises:
        UsageError: This process is a rank that has not begun to work.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UsageError(
            "a process that `launch` has started imports the script, and the script calls `launch` again. Call it "
            "below `if __name__ == '__main__':`, so that only the first process does."
        )


def _pickled(work: Any) -> bytes:
    try:
        return pickle.dumps(work)
    except Exception as error:
        raise UsageError(
            "`launch` must send the runtime, the function and its arguments to new processes, and they cannot be "
            f"pickled: {type(error).__name__}: {error}. Define the function at the top level of a module, make large "
            "objects inside the function, or use start_method='fork' if the processes run on the CPU."
        ) from error


def _run_rank(job: _Job) -> bytes | None:
    """Run the function on this rank, and return rank 0's pickled result."""
    from nucleate.cluster import forking, parent, process_group, started_rank, watch

    is_fork = job.start_method == "fork"
    if is_fork:
        forking.begin()
    if job.start_method == "forkserver":
        # The server lives as long as a process that it made, also after the end of the first process.
        parent.bind(os.getppid())
    parent.bind(job.supervisor)
    started_rank.be_child()
    if job.num_threads is not None:
        torch.set_num_threads(job.num_threads)
    try:
        runtime, function, args, kwargs = pickle.loads(job.work) if isinstance(job.work, bytes) else job.work
        runtime._renew()
        result = runtime.launch(function, *args, **kwargs)
        answer = _answer(result) if runtime.global_rank == 0 else None
    except BaseException as error:
        code = started_rank.report(error.with_traceback(_users_part(error.__traceback__)))
        if code:
            # Before this process is gone, which the other ranks notice.
            watch.end(error)
            sys.exit(code)
        answer = pickle.dumps(None)
    if is_fork:
        forking.end()
    else:
        process_group.stop()
    return answer


def _users_part(frames: TracebackType | None) -> TracebackType | None:
    """Return a traceback without the frames between this module and the user's function."""
    start = frames
    while start is not None and start.tb_frame.f_code.co_name in ("_run_rank", "launch"):
        start = start.tb_next
    return frames if start is None else start


def _answer(result: Any) -> bytes:
    """Pickle a result. Its tensors come to the CPU, so that the first process needs no device."""
    from nucleate.wrappers.dataloader import move

    try:
        return pickle.dumps(move(result, torch.device("cpu")))
    except Exception as error:
        raise UsageError(
            f"the function that `launch` ran returned {type(result).__name__}, which cannot be sent to the first "
            f"process: {type(error).__name__}: {error}. Return plain values and tensors, such as "
            "`model.state_dict()`, or save the result to a file."
        ) from error


def _error_of(error: RanksFailed) -> RankFailedError:
    failure = error.failure
    if failure.exit_code == 1:
        return RankFailedError(str(error))
    sys.stderr.write(f"{error}\n")
    exit_error = RankExitError(str(error))
    exit_error.code = failure.exit_code
    return exit_error


def _prepare() -> None:
    """Write out the text of this process before the ranks write theirs, and let this process end quickly later."""
    # The interpreter ends by several collections over all objects of torch, a quarter of the time of its import.
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
