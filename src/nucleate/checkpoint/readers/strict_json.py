"""A JSON parser that refuses ambiguous text: a key twice in an object, half characters, or bottomless nesting."""

from __future__ import annotations

import json
from typing import Any


def parse(data: bytes) -> Any:
    """Return the value that `data` holds as JSON.

    Raises:
        ValueError: `data` is not JSON, or is ambiguous.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_without_twins)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def cut(value: Any) -> str:
    """Return the text of a value for a message, shortened if it is long."""
    if isinstance(value, (list, dict)) and len(value) > 20:
        return f"a {type(value).__name__} of {len(value)}"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits has no repr
        return f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."


def are_sizes(numbers: Any) -> bool:
    """Return whether `numbers` is a list of sizes; true and 1.0 are not sizes."""
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    # JSON can also hold halves of characters, which no message could show.
    for key in found:
        key.encode("utf-8")
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"it holds {cut(key)} twice")
            seen.add(key)
    return found
