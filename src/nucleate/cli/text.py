"""Text for terminals: tables, numbers, and names that strangers chose."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

# Narrower, a name says nothing any more.
_MIN_WIDTH = 16
_BLOCK_LINES = 256


def printable(text: str, keep: str = "") -> str:
    r"""Return `text` with everything escaped that would do something to a terminal instead of being shown.

    Args:
        text: From a file, perhaps.
        keep: Characters to leave.

    >>> printable("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in keep else letter.encode("unicode_escape").decode()
        for letter in text
    )


def count(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> count(1, "tensor"), count(1200, "tensor")
    ('1 tensor', '1,200 tensors')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def cut(text: str, width: int) -> str:
    """Return `text` at most that wide, without its middle.

    >>> cut("model.layers.0.weight", 13)
    'model...eight'
    """
    if len(text) <= width:
        return text
    left = (width - 3) // 2
    return f"{text[:left]}...{text[len(text) - (width - 3 - left) :]}"


def write(lines: Iterable[str]) -> None:
    """Write lines to stdout, not all at once: without a buffer, what a closed pipe did not take is lost silently."""
    for block in batched(lines, _BLOCK_LINES):
        sys.stdout.write("".join(f"{line}\n" for line in block))


def batched(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield lists of so many lines; the last may be shorter."""
    waiting = iter(lines)
    while block := list(islice(waiting, size)):
        yield block


def width() -> int | None:
    """Return how wide a line may be; None where nobody looks at it in a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = (), wide: int | None = None) -> list[str]:
    """Return the lines of a table, the first row of which is its head.

    Args:
        rows: Of equal lengths.
        right: The columns that are aligned to the right.
        wide: What fits; the first and the last column are cut where it is less than is needed.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    if wide is not None:
        for column in (last, 0):
            excess = sum(widths) + 2 * last - wide
            if excess > 0:
                widths[column] = max(min(widths[column], _MIN_WIDTH), widths[column] - excess)
    lines = []
    for row in rows:
        cells = [
            cut(cell, size).rjust(size) if column in right else cut(cell, size).ljust(size)
            for column, (cell, size) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
