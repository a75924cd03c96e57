"""Runs a Python script on several ranks of one machine and gives back what they printed.

`run_ranks` starts them with torchrun, as users do. `fork_ranks` forks them from a process that has imported torch
already, which takes a tenth of the time: for scripts that check what ranks do, not how they start and end.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: What says a process's place among others; the launching process may be a rank itself.
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_starting = threading.Lock()


def run_ranks(
    script: str | Path,
    nproc: int,
    *args: object,
    timeout: float = 120,
    expected_rc: int | None = 0,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `script` under torchrun on `nproc` ranks, one thread each.

    Args:
        script: A path ending in `.py`, or the dotted name of a module.
        nproc: How many ranks.
        args: Passed to the script as strings.
        timeout: Seconds after which all of it is killed and the test fails.
        expected_rc: What torchrun must exit with; None accepts anything but 0.
        env: Added to the environment of the ranks.

    Raises:
        AssertionError: It exited otherwise, or took too long; the message carries the output.
    """
    target = [str(script)] if str(script).endswith(".py") else ["-m", str(script)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    process = subprocess.Popen(
        [*command, *target, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**_variables(), **(env or {})},
        cwd=ROOT,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        stdout, stderr = _end(process)
        raise AssertionError(
            f"{script} on {nproc} ranks did not end within {timeout} s.\n{_tail(stdout, stderr)}"
        ) from None
    except BaseException:
        _end(process)
        raise

    _check(f"{script} on {nproc} ranks", process.returncode, expected_rc, stdout, stderr)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def fork_ranks(
    script: str | Path,
    nproc: int,
    *args: object,
    timeout: float = 120,
    expected_rc: int | None = 0,
) -> subprocess.CompletedProcess[str]:
    """Run `script` on `nproc` forked ranks, one thread each, with torchrun's variables and its store.

    Takes and raises what `run_ranks` does; the exit status is that of the first rank that failed.
    """
    codes, stdout, stderr = _fork(script, nproc, args, timeout, joined=True)
    rc = next(filter(None, codes), 0)
    _check(f"{script} on {nproc} ranks", rc, expected_rc, stdout, stderr)
    return subprocess.CompletedProcess([str(script), *map(str, args)], rc, stdout, stderr)


def fork_unattended(script: str | Path, nproc: int, *args: object, timeout: float = 120) -> tuple[list[int], str, str]:
    """Run `script` on forked ranks that nobody watches over: one that fails does not end the others.

    Returns:
        What each rank exited with, negative for a signal, and what they printed to stdout and stderr.
    """
    return _fork(script, nproc, args, timeout, joined=False)


def _fork(
    script: str | Path, nproc: int, args: tuple[object, ...], timeout: float, joined: bool
) -> tuple[list[int], str, str]:
    target = str(Path(script).resolve()) if str(script).endswith(".py") else str(script)
    request = {"target": target, "nproc": nproc, "args": list(map(str, args)), "joined": joined}
    mine, theirs = socket.socketpair()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, mine:
        with theirs:
            descriptors = [theirs.fileno(), out.fileno(), err.fileno()]
            socket.send_fds(_fork_server(), [json.dumps(request).encode()], descriptors)
        mine.settimeout(timeout)
        with mine.makefile() as answers:
            launcher = 0
            try:
                launcher = int(answers.readline())
                codes = json.loads(answers.readline() or "null")
            except TimeoutError:
                codes = None
            finally:
                if launcher:
                    _kill_group(launcher)
        for file in (out, err):
            file.seek(0)
        stdout, stderr = out.read(), err.read()
    if codes is None:
        raise AssertionError(f"{script} on {nproc} ranks did not end within {timeout} s.\n{_tail(stdout, stderr)}")
    return codes, stdout, stderr


def _fork_server() -> socket.socket:
    """Start the server of this process, once; it ends with this process."""
    with _starting:
        return _started()


@functools.cache
def _started() -> socket.socket:
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", "tests.multi.fork_server", str(theirs.fileno())]
        server = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=_variables(), cwd=ROOT, stdin=subprocess.DEVNULL
        )

    def end() -> None:
        mine.close()
        server.wait()

    atexit.register(end)
    return mine


def _kill_group(launcher: int) -> None:
    """End what is left of a launcher and its ranks."""
    try:
        os.killpg(launcher, signal.SIGKILL)
    except ProcessLookupError:
        return


def _variables() -> dict[str, str]:
    """Return the environment for ranks, which import the tests' modules and get a place of their own."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), variables.get("PYTHONPATH", "")]))
    for name in _PLACE:
        variables.pop(name, None)
    return variables


def _check(what: str, rc: int, expected_rc: int | None, stdout: str, stderr: str) -> None:
    if (rc == 0) if expected_rc is None else (rc != expected_rc):
        wanted = "a failure" if expected_rc is None else expected_rc
        raise AssertionError(f"{what} exited with {rc}, expected {wanted}.\n{_tail(stdout, stderr)}")


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End torchrun so that it ends its ranks: they are in sessions of their own and would outlive a SIGKILL."""
    process.send_signal(signal.SIGTERM)
    try:
        # torchrun gives the ranks 30 s before it kills them.
        return process.communicate(timeout=45)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()


def _tail(stdout: str, stderr: str, limit: int = 8000) -> str:
    return f"--- stdout\n{stdout[-limit:]}\n--- stderr\n{stderr[-limit:]}"
