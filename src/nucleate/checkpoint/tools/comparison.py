"""Comparison of two checkpoints of any formats, tensor by tensor and value by value, bit for bit."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nucleate.checkpoint.state.tree import KeyPath, key_of
from nucleate.checkpoint.stored.contents import Contents
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.checkpoint.tools.selection import names_of
from nucleate.errors import CheckpointError


@dataclass(frozen=True)
class Difference:
    """A difference between two checkpoints.

    Attributes:
        name: The name of the tensor or value.
        detail: The difference: the first checkpoint, then the second.
    """

    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}"


class Comparison:
    """A comparison of two checkpoints, and the differences that it has found.

    A tied tensor may have all its names in one checkpoint and only the first in the other. Nothing is missing then.

    Attributes:
        path: The second checkpoint.
    """

    def __init__(self, one: Contents, two: Contents) -> None:
        """Compare the headers.

        Args:
            one: The first checkpoint, with each tensor once.
            two: The second checkpoint, with each tensor once.
        """
        self.path = two.path
        self._lock = threading.Lock()
        self._found: list[Difference] = []
        mine, theirs = names_of(one), names_of(two)
        common = [name for name in mine if name in theirs]
        my_common, their_common = {mine[name].key for name in common}, {theirs[name].key for name in common}
        for name, stored in mine.items():
            if name not in theirs and stored.key not in my_common:
                self.add(Difference(name, f"{_described(stored)}, but missing in {two.path}"))
        for name, stored in theirs.items():
            if name not in mine and stored.key not in their_common:
                self.add(Difference(name, f"missing in {one.path}, but {_described(stored)} in {two.path}"))
        # Usually one second tensor for each first one; more if only one checkpoint ties them.
        self._pairs: dict[str, dict[str, tuple[str, StoredTensor]]] = {}
        for name in common:
            first, second = mine[name], theirs[name]
            if (first.dtype, first.shape) == (second.dtype, second.shape):
                self._pairs.setdefault(first.key, {}).setdefault(second.key, (name, second))
            else:
                self.add(Difference(name, f"{_described(first)} but {_described(second)} in {two.path}"))
        self._found.extend(_values(one, two))

    def of(self, stored: StoredTensor) -> list[Unequal]:
        """Return objects that compare a tensor of the first checkpoint with its partners in the second."""
        return [Unequal(self, name, other) for name, other in self._pairs.get(stored.key, {}).values()]

    def add(self, difference: Difference) -> None:
        """Add a difference, from any thread."""
        with self._lock:
            self._found.append(difference)

    def differences(self) -> list[Difference]:
        """Return the differences, sorted by name."""
        return sorted(self._found, key=lambda difference: difference.name)


class Unequal:
    """Compares the elements of one tensor with another's, range by range."""

    def __init__(self, comparison: Comparison, name: str, other: StoredTensor) -> None:
        self._comparison = comparison
        self._name = name
        self._other = other
        self._buffer: Tensor | None = None
        self._count = 0
        self._first: int | None = None
        self._failure = ""

    def look(self, start: int, values: Tensor) -> None:
        """Compare a range that begins at the element `start`."""
        if self._failure:
            return
        if self._buffer is None:
            self._buffer = torch.empty_like(values)
        theirs = self._buffer[: values.numel()]
        try:
            self._other.read(start, theirs)
        except CheckpointError as error:
            self._failure = str(error)
            return
        # Bytes are compared: NaN is equal to itself here, and 0 differs from -0.
        mine, theirs = values.view(torch.uint8), theirs.view(torch.uint8)
        if torch.equal(mine, theirs):
            return
        unequal = (mine != theirs).view(values.numel(), -1).any(1)
        self._count += int(unequal.sum())
        if self._first is None:
            self._first = start + int(unequal.to(torch.uint8).argmax())

    def close(self) -> None:
        """Add the difference to the comparison, if there is one."""
        if self._failure:
            self._comparison.add(Difference(self._name, self._failure))
            return
        if self._first is None:
            return
        shape = self._other.shape
        self._comparison.add(
            Difference(
                self._name,
                f"{self._count} of {math.prod(shape)} elements differ, the first at {_index(self._first, shape)}",
            )
        )


def _index(place: int, shape: tuple[int, ...]) -> list[int]:
    index = []
    for length in reversed(shape):
        index.append(place % length)
        place //= length
    return index[::-1]


def _described(stored: StoredTensor) -> str:
    return f"{str(stored.dtype).removeprefix('torch.')} {stored.shape}"


def _values(one: Contents, two: Contents) -> Iterator[Difference]:
    """Yield the plain values that differ. Values that are not read cannot be compared."""
    mine, theirs = dict(leaves(one)), dict(leaves(two))
    for place in (*one.objects, *two.objects):
        if place in mine and place in theirs:
            del mine[place], theirs[place]
    for place, value in mine.items():
        name = key_of(place)
        if place not in theirs:
            yield Difference(name, f"{_shown(value)}, but missing in {two.path}")
        elif not _same(value, theirs[place]):
            yield Difference(name, f"{_shown(value)} but {_shown(theirs[place])}")
    for place, value in theirs.items():
        if place not in mine:
            yield Difference(key_of(place), f"missing in {one.path}, but {_shown(value)} in {two.path}")


def leaves(contents: Contents) -> Iterator[tuple[KeyPath, Any]]:
    """Yield the plain values of a checkpoint and their places. An empty dict or list is a plain value, too."""
    yield from _leaves(contents.skeleton, (), contents)


def _leaves(node: Any, place: KeyPath, contents: Contents) -> Iterator[tuple[KeyPath, Any]]:
    if place in contents.keys:
        return
    items = node.items() if isinstance(node, dict) else enumerate(node) if type(node) in (list, tuple) else ()
    if not items or not node:
        if place:
            yield place, node
        return
    for key, item in items:
        yield from _leaves(item, (*place, key), contents)


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, dict) and isinstance(two, dict):  # both are empty: otherwise their items would be leaves
        return True
    # Texts are compared, so that NaN is equal to NaN.
    return type(one) is type(two) and (one == two or repr(one) == repr(two))


def _shown(value: Any) -> str:
    text = text_of(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def text_of(value: Any) -> str:
    """Return the `repr` of a plain value. Python refuses it for numbers of thousands of digits."""
    try:
        return repr(value)
    except ValueError:
        return f"<a {type(value).__name__} with numbers of thousands of digits>"
