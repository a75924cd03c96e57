"""Write a checkpoint of any format in another format, bit for bit and in constant memory. DST is whole or absent."""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING

from nucleate.cli import text
from nucleate.errors import ConfigurationError, name_list
from nucleate.registry import WRITERS

if TYPE_CHECKING:
    from nucleate.checkpoint import KeyMap

HELP = "write a checkpoint in another format"

_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
    **{name: name for name in ("bfloat16", "float16", "float32", "float64")},
}
# An `=` that is not a part of `(?=` or `(?<=`; the first one counts.
_EQUALS = re.compile(r"(?<!\(\?)(?<!\(\?<)=")


def add(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("source", metavar="SRC", help="a file or folder of any format")
    parser.add_argument(
        "target", metavar="DST", help="FILE.safetensors, FILE.pt, .pth, .bin or .ckpt for one file, else a folder"
    )
    parser.add_argument("--format", choices=WRITERS.names(), help="the format of a DST folder")
    parser.add_argument(
        "--dtype", choices=sorted(_DTYPES), metavar="DTYPE", help="cast models to bf16, fp16, fp32, ..."
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest safetensors file, default 5GB")
    parser.add_argument("--only", default="", metavar="ENTRY", help="only this entry of a training state, alone")
    parser.add_argument("--prefix", default="", help="only tensors whose names begin with PREFIX, which is removed")
    parser.add_argument(
        "--keys",
        action="extend",
        nargs="+",
        default=[],
        metavar="REGEX=REPL|FILE.toml",
        help="rename tensors: replace matches of REGEX by REPL, one pair after the other; or apply the rules in "
        "FILE.toml, which may join, split, transpose and permute tensors too",
    )
    parser.add_argument("--inverse", action="store_true", help="undo the rules of --keys FILE.toml")
    parser.add_argument("--force", action="store_true", help="replace the checkpoint at DST")
    parser.add_argument("--reader", metavar="NAME", help="the format of SRC, if the files do not show it")


def sources(args: argparse.Namespace) -> list[str]:
    """Return the paths that must exist."""
    return [args.source]


def run(args: argparse.Namespace) -> int:
    """Convert, with a progress bar."""
    import torch

    from nucleate.checkpoint.tools.converter import convert
    from nucleate.checkpoint.tools.selection import Selection
    from nucleate.report.memory import format_bytes
    from nucleate.report.meter import metered

    keys = _keys(args.keys, args.inverse)
    with metered(True):
        report = convert(
            args.source,
            args.target,
            format=args.format,
            dtype=getattr(torch, _DTYPES[args.dtype]) if args.dtype else None,
            max_shard_size=args.max_shard_size,
            selection=Selection(only=args.only, prefix=args.prefix, keys=keys or None),
            reader=args.reader,
            overwrite=args.force,
        )
    details = [text.count(report.num_tensors, "tensor"), format_bytes(report.size_bytes)]
    if report.num_cast:
        details.append(f"{report.num_cast:,} cast to {_DTYPES[args.dtype]}")
    if report.num_tied:
        details.append(f"{report.num_tied:,} tied")
    sys.stdout.write(
        f"{report.target} ({report.format}): {', '.join(details)}, in {report.seconds:.1f} s from {report.source} "
        f"({report.source_format})\n"
    )
    if report.passed_over:
        sys.stdout.write(f"passed over: {text.printable(name_list(report.passed_over))}\n")
    return 0


def _keys(arguments: list[str], undo: bool) -> list[KeyMap]:
    from nucleate.checkpoint import inverse, read_rules

    if undo and not (arguments and all(_is_file(each) for each in arguments)):
        raise ConfigurationError("--inverse undoes the rules of --keys FILE.toml; --keys must name only such files.")
    found: list[KeyMap] = [read_rules(each) if _is_file(each) else _renaming(each) for each in arguments]
    if undo:
        return [inverse(read_rules(each)) for each in reversed(arguments)]
    return found


def _is_file(argument: str) -> bool:
    return argument.endswith(".toml") and "=" not in argument


def _renaming(argument: str) -> dict[str, str]:
    parts = _EQUALS.split(argument, maxsplit=1)
    if len(parts) != 2 or not parts[0]:
        raise ConfigurationError(
            f"--keys {argument!r} must be REGEX=REPL, such as '^model\\.=' or 'layers\\.(\\d+)=h.\\1', or FILE.toml."
        )
    return {parts[0]: parts[1]}
