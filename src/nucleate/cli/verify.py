"""Read every byte of a checkpoint and report damage; compare the checkpoint with another one, bit for bit."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nucleate.cli import text
from nucleate.errors import name_list

if TYPE_CHECKING:
    from nucleate.checkpoint.tools.verifier import VerifyReport

HELP = "read a whole checkpoint, report damage, compare"

#: The version of the JSON document. It increases when a field changes or goes away.
JSON_VERSION = 1
#: The exit status for a checkpoint that is not known to be damaged, but that nucleate does not read.
UNREADABLE = 3


def add(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments."""
    parser.add_argument("path", metavar="PATH", help="a file or folder of any format")
    parser.add_argument("--against", metavar="OTHER", help="compare with this checkpoint, of any format, bit for bit")
    parser.add_argument("--hash", action="store_true", help="print a SHA-256 of each tensor, and one of all tensors")
    parser.add_argument("--json", action="store_true", help="write JSON")
    parser.add_argument("--reader", metavar="NAME", help="the format of PATH, if the files do not show it")


def sources(args: argparse.Namespace) -> list[str]:
    """Return the paths that must exist."""
    return [args.path] if args.against is None else [args.path, args.against]


def run(args: argparse.Namespace) -> int:
    """Verify, with a progress bar, and return the exit status."""
    from nucleate.checkpoint.tools.verifier import verify
    from nucleate.report.meter import metered

    with metered(True):
        report = verify(args.path, against=args.against, hashes=args.hash, reader=args.reader)
    text.write(json.dumps(_document(report), indent=2).splitlines() if args.json else _lines(report))
    if report.unreadable:
        return UNREADABLE
    return 0 if report.is_good else 1


def _lines(report: VerifyReport) -> Iterator[str]:
    from nucleate.report.memory import format_bytes

    for name, key in report.names.items():
        if key in report.tensors and report.tensors[key].sha256:
            yield f"{report.tensors[key].sha256}  {text.printable(name)}"
    if report.sha256:
        yield f"{report.sha256}  (all tensors)"
    for damage in report.damage:
        yield f"damaged: {f'{damage.key}: ' * bool(damage.key)}{text.printable(damage.message)}"
    if report.unreadable:
        yield f"not readable: {text.printable(report.unreadable)}"
    if report.not_read:
        yield f"not read: {text.printable(name_list(report.not_read))}"
    for difference in report.differences:
        yield f"unequal: {text.printable(str(difference))}"
    for check in report.tensors.values():
        if check.num_nan or check.num_inf:
            yield f"not finite: {text.printable(check.key)} {check.shape}: {check.num_nan:,} NaN, {check.num_inf:,} Inf"
    read = f"{text.count(len(report.tensors), 'tensor')}, {format_bytes(report.size_bytes)}, read"
    verdict = "damaged" if report.damage else "not readable" if report.unreadable else "whole"
    if report.against is not None:
        verdict += f", {text.count(len(report.differences), 'difference')} to {report.against}"
        verdict = verdict if report.differences else f"whole, equal to {report.against}"
    yield f"{report.path}{f' ({report.format})' * bool(report.format)}: {read}: {verdict}"


def _document(report: VerifyReport) -> dict[str, Any]:
    return {
        "version": JSON_VERSION,
        "path": str(report.path),
        "format": report.format or None,
        "is_good": report.is_good,
        "size_bytes": report.size_bytes,
        "sha256": report.sha256 or None,
        "unreadable": report.unreadable or None,
        "not_read": report.not_read,
        "damage": [{"key": one.key or None, "files": list(one.files), "message": one.message} for one in report.damage],
        "against": None if report.against is None else str(report.against),
        "differences": [{"key": one.name, "detail": one.detail} for one in report.differences],
        "tensors": [
            {
                "key": name,
                "tied_to": None if name == key else key,
                "dtype": str(check.dtype).removeprefix("torch."),
                "shape": list(check.shape),
                "num_nan": check.num_nan,
                "num_inf": check.num_inf,
                "sha256": check.sha256 or None,
            }
            for name, key in report.names.items()
            if (check := report.tensors.get(key)) is not None
        ],
    }
