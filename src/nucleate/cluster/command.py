"""The command line that runs the program of this process once more, in a rank."""

from __future__ import annotations

import multiprocessing
import os
import sys

from nucleate.errors import UsageError

_TO_DO = (
    "Pass a function, which processes can run: runtime.launch(main) calls main(runtime) in each of them. Or start the "
    "script with torchrun"
)


def program_file() -> str | None:
    """Return the file of this process's program, or None, as for a notebook or a program that comes through a pipe."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    # A program in an archive has a specification, and its file is inside of the archive.
    is_found = file is not None and (os.path.isfile(file) or getattr(main, "__spec__", None) is not None)
    return file if is_found else None


def command_again(asked: str) -> list[str]:
    """Return the command line of this process: the interpreter, its options, the script or module, and the arguments.

    Args:
        asked: The request for several processes, for messages.

    Raises:
        UsageError: This process runs no program that can be run again, such as an interactive session.
    """
    file, reason = program_file(), None
    if hasattr(sys, "ps1") or sys.flags.interactive:
        reason = "this is an interactive session"
    elif multiprocessing.parent_process() is not None:
        reason = "this process was started by multiprocessing"
    elif not sys.executable or len(sys.orig_argv) < 2:
        reason = "this process was not started by a command line of Python"
    elif file is None and sys.argv[:1] != ["-c"]:
        reason = "the program was not read from a file"
    if reason is not None:
        raise UsageError(f"{asked} runs the script again in each process, but {reason}. {_TO_DO}.")
    options = list(sys.orig_argv[1:])
    if file is not None and getattr(sys.modules["__main__"], "__spec__", None) is None:
        # A script may have changed the folder since it began.
        for place, option in enumerate(options):
            if os.path.basename(option) == os.path.basename(file):
                options[place] = os.path.abspath(file)
                break
    return [sys.executable, *options]
