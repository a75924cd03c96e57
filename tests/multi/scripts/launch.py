"""Ranks that `devices=2` starts, and a fault: `script` runs this file again, any other way runs a function."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from typing import Any

from nucleate import Runtime
from nucleate.strategies.ddp import DDPStrategy


def say(text: str) -> None:
    # In one write: two ranks would mix the words of `print`.
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def work(runtime: Runtime, fault: str) -> int:
    runtime.barrier()
    say(f"PID {os.getpid()}")
    if runtime.global_rank == 1:
        if fault == "error":
            raise ValueError("out of cheese")
        if fault == "exit":
            sys.exit(3)
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "wait":
            time.sleep(600)
    runtime.barrier()
    return int(runtime.all_reduce(1, reduce_op="sum"))


def main(way: str, fault: str) -> None:
    options: dict[str, Any] = {} if way in ("script", "function") else {"strategy": f"ddp_{way}"}
    if way == "forkserver":
        options["strategy"] = DDPStrategy(start_method=way)
        # The server may have begun before, for another purpose. It has the environment of that time.
        process = multiprocessing.get_context(way).Process(target=abs, args=(-1,))
        process.start()
        process.join()
    runtime = Runtime(accelerator="cpu", devices=2, **options)
    if way == "script":
        # Without `launch`: the first method that needs the ranks starts them.
        say(f"ranks {work(runtime, fault)}")
    else:
        say(f"result {runtime.launch(work, fault=fault)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
