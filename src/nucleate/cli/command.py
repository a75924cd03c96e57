"""What is run when `nucleate` is.

This file decides what is common to all commands: how they are found, how errors reach the user, and what the exit
status means. A command is a file of this package with `add`, which describes its arguments, and `run`, which imports
what it needs: `nucleate --help` must not wait for torch.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from nucleate import __version__
from nucleate.cli import convert, inspect, verify
from nucleate.cli.text import printable
from nucleate.errors import (
    CheckpointKeyError,
    CheckpointNotFoundError,
    ConfigurationError,
    MissingDependencyError,
    NucleateError,
    UsageError,
)

#: A checkpoint is damaged, or not equal to another, or could not be written.
FAILED = 1
#: What was asked for makes no sense: wrong arguments, nothing at a path.
MISUSED = 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_PIPE_CLOSED = 141  # 128 + SIGPIPE

_EPILOG = "exit status: 0 all is well, 1 damaged, unequal or failed, 2 wrong arguments or nothing at a path"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        argv: The arguments; by default those of the process.
    """
    args = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        # What a terminal has no letters for is no reason to fail.
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read has seen enough, as `head` does. What is still buffered must not be tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except KeyboardInterrupt:
        return _fail(args, "interrupted.", _INTERRUPTED)
    except NucleateError as error:
        return _fail(args, str(error), _status(error, args))
    except (OSError, MemoryError) as error:
        return _fail(args, f"{type(error).__name__}: {error}", FAILED)
    except Exception as error:
        hint = "" if _wants_traceback(args) else " This is a fault of nucleate; --traceback shows where."
        return _fail(args, f"{type(error).__name__}: {error}.{hint}", FAILED)


def _status(error: NucleateError, args: argparse.Namespace) -> int:
    if isinstance(error, (ConfigurationError, UsageError, MissingDependencyError)):
        return MISUSED
    if isinstance(error, CheckpointNotFoundError):
        # Nothing has that name, or a file of it is missing.
        return FAILED if all(os.path.lexists(path) for path in args.sources(args)) else MISUSED
    # Only what the user chose by name raises this; readers do not.
    return MISUSED if isinstance(error, CheckpointKeyError) else FAILED


def _fail(args: argparse.Namespace, message: str, status: int) -> int:
    if _wants_traceback(args):
        traceback.print_exc()
    print(f"nucleate {args.command}: {printable(message, keep=chr(10))}", file=sys.stderr)  # noqa: T201
    return status


def _wants_traceback(args: argparse.Namespace) -> bool:
    # Given before the command or after it; absent otherwise, so that the one does not undo the other.
    return getattr(args, "traceback", False)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help="show where an error arose")
    parser = argparse.ArgumentParser(
        prog="nucleate",
        description="Look into checkpoints of any format, convert them, verify them.",
        epilog=_EPILOG,
        parents=[common],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nucleate {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (inspect, convert, verify):
        name = command.__name__.rpartition(".")[2]
        description = (command.__doc__ or "").partition("\n\n")[0]
        sub = commands.add_parser(
            name, help=command.HELP, description=description, epilog=_EPILOG, parents=[common], allow_abbrev=False
        )
        command.add(sub)
        sub.set_defaults(run=command.run, sources=command.sources)
    return parser
