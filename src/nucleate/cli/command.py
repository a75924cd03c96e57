"""Entry point of the command `nucleate`.

This file holds the common part of all commands: the list of commands, the output of errors, and the meaning of the exit
status. A command is a file of this package with `add`, which describes its arguments, `sources`, which returns its
input paths, and `run`. Only `run` imports torch, because `nucleate --help` must not wait for torch.
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

#: A checkpoint is damaged, differs from another one, or could not be written.
FAILED = 1
#: The request makes no sense: wrong arguments, or nothing at a path.
MISUSED = 2
_INTERRUPTED = 130  # 128 + SIGINT, as in shells
_PIPE_CLOSED = 141  # 128 + SIGPIPE

_EPILOG = (
    "exit status: 0 all is well, 1 damaged, unequal or failed, 2 wrong arguments or nothing at a path, 3 not "
    "damaged as far as is known, but of a kind that is not read (verify)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        argv: The arguments; by default the arguments of the process.
    """
    args = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal cannot show must not cause an error.
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader has closed the pipe, as `head` does. Python must not write the rest of its buffer again at exit.
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
        # Nothing has that name, or a file of the checkpoint is missing.
        return FAILED if all(os.path.lexists(path) for path in args.sources(args)) else MISUSED
    # Only names that the user chose raise this error; readers do not.
    return MISUSED if isinstance(error, CheckpointKeyError) else FAILED


def _fail(args: argparse.Namespace, message: str, status: int) -> int:
    if _wants_traceback(args):
        traceback.print_exc()
    print(f"nucleate {args.command}: {printable(message, keep=chr(10))}", file=sys.stderr)  # noqa: T201
    return status


def _wants_traceback(args: argparse.Namespace) -> bool:
    # The option may come before or after the command. It is absent if not given, so that one parser does not undo the
    # other's.
    return getattr(args, "traceback", False)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help="show where an error arose")
    parser = argparse.ArgumentParser(
        prog="nucleate",
        description="Inspect, convert and verify checkpoints of any format.",
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
