"""Text for terminals: tables, numbers, and names from files that are not trusted."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

# In a narrower column, a name says nothing any more.
_MIN_WIDTH = 16
_BLOCK_LINES = 256


def printable(text: str, keep: str = "") -> str:
    r"""Return `text` with escapes for characters that control a terminal instead of being shown.

    Args:
        text: A text that may come from a file.
        keep: Characters that stay unescaped.

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
    """Return `text`, without its middle if it is longer than `width`.

    >>> cut("model.layers.0.weight", 13)
    'model...eight'
    """
    if len(text) <= width:
        return text
    left = (width - 3) // 2
    return f"{text[:left]}...{text[len(text) - (width - 3 - left) :]}"


def write(lines: Iterable[str]) -> None:
    """Write lines to stdout in blocks: without a buffer, Python silently loses the rest that a closed pipe refuses."""
    for block in batched(lines, _BLOCK_LINES):
        sys.stdout.write("".join(f"{line}\n" for line in block))


def batched(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield lists of `size` lines; the last one may be shorter."""
    waiting = iter(lines)
    while block := list(islice(waiting, size)):
        yield block


def width() -> int | None:
    """Return the greatest width of a line; None if stdout is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = (), wide: int | None = None) -> list[str]:
    """Return the lines of a table, whose first row is its head.

    Args:
        rows: Rows of equal lengths.
        right: The columns that are aligned to the right.
        wide: The greatest width of a line. The last and the first column are cut if the table is wider.
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
