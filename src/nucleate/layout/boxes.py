"""Boxes: n-dimensional parts of a tensor, and the ranges of elements that they cover in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor that a rank holds.

    Attributes:
        begin: The box's first index in the whole tensor, in each dim.
        size: The box's size in each dim.
        local: The box's first index in the tensor that the rank holds. A rank may hold several boxes in one tensor.
    """

    begin: tuple[int, ...]
    size: tuple[int, ...]
    local: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.size)

    def of_whole(self, whole: Tensor) -> Tensor:
        """Return a view of the box in the whole tensor."""
        return _narrowed(whole, self.begin, self.size)

    def of_local(self, local: Tensor) -> Tensor:
        """Return a view of the box in the tensor that the rank holds."""
        return _narrowed(local, self.local, self.size)


def _narrowed(tensor: Tensor, begin: Sequence[int], size: Sequence[int]) -> Tensor:
    for dim, (first, length) in enumerate(zip(begin, size, strict=True)):
        if length != tensor.shape[dim]:
            tensor = tensor.narrow(dim, first if length else 0, length)
    return tensor


def merged(
    shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Merge each dim that the box covers into the dim before it."""
    whole, first, size = [1], [0], [1]
    for length, offset, wanted in zip(shape, offsets, sizes, strict=True):
        covers = wanted == length
        if covers or whole[-1] == 1:
            whole[-1], first[-1], size[-1] = whole[-1] * length, first[-1] * length + offset, size[-1] * wanted
        else:
            whole.append(length)
            first.append(offset)
            size.append(wanted)
    return whole, first, size


def runs(begin: Sequence[int], shape: Sequence[int], whole: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a box in a tensor that is stored row by row, as (first element, number of elements).

    Args:
        begin: The box's first index in each dim.
        shape: The box's shape; not empty.
        whole: The tensor's shape.

    Examples:
        >>> list(runs((1, 0), (2, 4), (5, 4)))  # rows: one run
        [(4, 8)]
        >>> list(runs((0, 2), (2, 2), (2, 4)))  # columns
        [(2, 2), (6, 2)]
    """
    inner = len(shape)
    while inner > 0 and shape[inner - 1] == whole[inner - 1]:
        inner -= 1
    # The box covers the dims from `inner` on, so the dim before them is one range for each index of the dims before it.
    outer = max(0, inner - 1)
    strides = [math.prod(whole[dim + 1 :]) for dim in range(len(whole))]
    numel = math.prod(shape[outer:])
    last = sum(first * stride for first, stride in zip(begin[outer:], strides[outer:], strict=True))
    for index in itertools.product(*(range(b, b + n) for b, n in zip(begin[:outer], shape[:outer], strict=True))):
        yield last + sum(place * stride for place, stride in zip(index, strides, strict=False)), numel
