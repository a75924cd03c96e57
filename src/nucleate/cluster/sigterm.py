"""SIGTERM, which a scheduler sends before it ends a job: all ranks agree on the step after which they end.

The signal may reach one rank only, or reach ranks at different steps. Steps themselves exchange nothing: each rank
counts them. A thread waits in the group's store. When a rank gets the signal, the threads of all ranks wake, and each
promises that its rank will not go beyond the step that it is in. The last of these steps is the one after which all
ranks end.

`wrappers/termination.py` decides where in the training loop that is, and what happens there.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any

import torch.distributed as dist

from nucleate.cluster import started_rank
from nucleate.errors import RankFailedError, name_list

#: The exit code of a process that SIGTERM ends, as shells count it.
EXIT_CODE = 143

#: The time for the threads of all ranks to answer. A launcher gives ranks 30 s before it kills them.
_ANSWER = timedelta(seconds=10)
_WAIT = timedelta(days=1)
_JOIN_S = 5.0
_LEFT = "left"

# The listener of this process. A process has one handler of a signal.
_current: Sigterm | None = None


class Sigterm:
    """The listener of one rank.

    Args:
        rank: The number of this process among all processes.
        world_size: The number of processes.
        name: The name of this listening in the store, the same on all ranks and different for each start of the ranks.
        refusal: Returns the reason why this rank cannot wait for the end of a step now, or None.

    Attributes:
        num_steps: The number of steps of this rank.
    """

    def __init__(self, rank: int, world_size: int, name: str, refusal: Callable[[], str | None]) -> None:
        self.num_steps = 0
        self._rank = rank
        self._world_size = world_size
        self._prefix = f"nucleate/sigterm/{name}"
        self._refusal = refusal
        self._pid = os.getpid()
        self._is_asked = False
        self._is_stopped = False
        # The thread writes the promise, and the training reads it and counts.
        self._lock = threading.Lock()
        self._promised: int | None = None
        self._agreed = threading.Event()
        self._last: int | None = None
        self._failure = ""
        self._thread: threading.Thread | None = None
        self._before: Any = None

    def start(self) -> None:
        """Handle the signal from now on, in place of the listener that this process had before."""
        global _current
        if _current is not None:
            _current.stop()
        _current = self
        if self._world_size > 1:
            # A store serves one thread at a time. The handler may interrupt an operation on the group's own one.
            default = dist.distributed_c10d._get_default_store()
            self._store, self._waiting = default.clone(), default.clone()  # type: ignore[attr-defined]
            self._thread = threading.Thread(target=self._listen, name="nucleate-sigterm", daemon=True)
            self._thread.start()
        self._before = signal.signal(signal.SIGTERM, self._handle)
        # Before the process group ends.
        atexit.register(self.stop)

    def stop(self) -> None:
        """Handle the signal no longer."""
        global _current
        atexit.unregister(self.stop)
        if self._is_stopped or self._pid != os.getpid():
            return
        self._is_stopped = True
        if _current is self:
            _current = None
        if self._thread is not None:
            # The server of the store may have ended, and the thread with it.
            with contextlib.suppress(Exception):
                if self._promised is None:
                    self._store.set(self._promise_of(self._rank), _LEFT)
                self._store.set(self._notice_of(self._rank), _LEFT)
            self._thread.join(_JOIN_S)
        # `==`, because each look at a method makes a new object.
        if signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

    def end(self) -> None:
        """Ignore the signal from now on, because this process is about to end."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def step_ended(self) -> bool:
        """Count a step, and return whether it is the last one, or comes after the last one.

        Raises:
            RankFailedError: The signal came, and another rank did not answer.
        """
        with self._lock:
            self.num_steps += 1
            promised = self._promised
        if promised is None or self.num_steps < promised:
            return False
        # The threads answer at once, also while their ranks wait in a collective for this one.
        self._agreed.wait()
        if self._last is None:
            raise RankFailedError(f"SIGTERM came, and the ranks cannot end after the same step: {self._failure}")
        return self.num_steps >= self._last

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal, in the main thread."""
        if os.getpid() != self._pid:
            # A fork of this process has inherited the handler.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self._is_asked:
            return
        reason = self._refusal()
        if started_rank.is_failing():
            # The supervisor ends this rank because another one failed.
            reason = ""
        if reason is not None:
            if reason:
                sys.stderr.write(f"rank {self._rank} of {self._world_size} got SIGTERM: {reason}\n")
                sys.stderr.flush()
            raise SystemExit(EXIT_CODE)
        self._is_asked = True
        if self._world_size == 1:
            self._promised = self._last = self.num_steps + 1
            self._agreed.set()
            return
        # Without a server there is no other rank to agree with, and collectives fail by themselves.
        with contextlib.suppress(Exception):
            self._store.set(self._notice_of(self._rank), "")

    def _listen(self) -> None:
        """Wait until any rank gets the signal, and agree with the others. The thread runs this."""
        try:
            self._wait_for_notice()
            if not self._is_stopped:
                self._agree()
        except Exception as error:
            # Mostly because the server has ended, with the job.
            self._failure = f"{type(error).__name__}: {error}"
        finally:
            self._agreed.set()

    def _wait_for_notice(self) -> None:
        while True:
            try:
                self._waiting.wait([self._notice_of(self._rank)], _WAIT)
            except dist.DistStoreError as error:
                if "timeout" not in str(error).lower():
                    raise
            else:
                return

    def _agree(self) -> None:
        with self._lock:
            self._promised = self.num_steps + 1
        self._waiting.set(self._promise_of(self._rank), str(self._promised))
        ranks = range(self._world_size)
        for rank in ranks:
            self._waiting.set(self._notice_of(rank), "")
        keys = [self._promise_of(rank) for rank in ranks]
        try:
            self._waiting.wait(keys, _ANSWER)
        except dist.DistStoreError:
            silent = [str(rank) for rank in ranks if not self._waiting.check([keys[rank]])]
            self._failure = f"rank {name_list(silent)} did not answer within {_ANSWER.seconds} s."
            return
        promises = [self._waiting.get(key).decode() for key in keys]
        left = [str(rank) for rank in ranks if promises[rank] == _LEFT]
        if left:
            self._failure = f"rank {name_list(left)} has ended already."
        else:
            self._last = max(map(int, promises))

    def _notice_of(self, rank: int) -> str:
        return f"{self._prefix}/notice/{rank}"

    def _promise_of(self, rank: int) -> str:
        return f"{self._prefix}/promise/{rank}"
