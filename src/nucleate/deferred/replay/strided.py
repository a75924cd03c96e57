"""Strided reads: reads of a transposed, permuted or narrowed tensor by a function that reads only contiguous ranges.

A range of such a tensor is a few boxes. Each box is read in the order in which its elements lie in memory or on disk.
The elements go through a tile of bounded size, and from the tile to their places. So the runs that are read are as long
as the box allows, and only the tile is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

#: The largest size of a tile. A thread holds one tile, and one more where runs are short.
TILE_BYTES = 2 << 20
#: Shorter runs are read together with the elements between them, in reads of at most `_QUICK_BYTES`.
SHORT_BYTES = 512
# Reading this much takes about as long as two calls in Python.
_QUICK_BYTES = 64 << 10
# Up to this many runs are read one by one, even if they are short.
_FEW_RUNS = 1024

#: `(start, out)`: fill `out`, one-dimensional and contiguous, with the elements from `start` on.
Read = Callable[[int, Tensor], None]


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield the boxes, as first index and shape, that together are a range of the elements, in order.

    >>> list(boxes((3, 4), 2, 9))
    [((0, 2), (1, 2)), ((1, 0), (1, 4)), ((2, 0), (1, 1))]
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    inner, row = tuple(shape[1:]), math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # all in one row
        for begin, lengths in boxes(inner, start - last * row, stop - last * row):
            yield (last, *begin), (1, *lengths)
        return
    for begin, lengths in boxes(inner, start - (first - 1) * row, row) if start < first * row else ():
        yield (first - 1, *begin), (1, *lengths)
    if first < last:
        yield (first, *(0,) * len(inner)), (last - first, *inner)
    for begin, lengths in boxes(inner, 0, stop - last * row):
        yield (last, *begin), (1, *lengths)


def coalesced(size: Sequence[int], stride: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the same elements in the same order with as few dims as possible.

    >>> coalesced((2, 3, 1, 4), (12, 4, 7, 1))
    ((24,), (1,))
    """
    lengths: list[int] = []
    steps: list[int] = []
    for length, step in zip(size, stride, strict=True):
        if length == 1:
            continue
        if lengths and steps[-1] == step * length:
            lengths[-1], steps[-1] = lengths[-1] * length, step
        else:
            lengths.append(length)
            steps.append(step)
    return tuple(lengths), tuple(steps)


def _by_rows(size: Sequence[int], stride: Sequence[int], columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the same elements with as few dims as possible, so that the last dims together have `columns` elements."""
    dim, below = len(size), 1
    while below < columns:
        dim -= 1
        below *= size[dim]
    outer, inner = list(zip(size, stride, strict=True))[:dim], list(zip(size, stride, strict=True))[dim:]
    if below > columns:
        # This dim belongs partly to the rows and partly to the columns.
        length, step = inner.pop(0)
        outer.append((below // columns, step * length * columns // below))
        inner.insert(0, (length * columns // below, step))
    rows, row = (coalesced([n for n, _ in dims], [s for _, s in dims]) for dims in (outer, inner))
    return (*rows[0], *row[0]), (*rows[1], *row[1])


def composed(
    start: int, size: Sequence[int], stride: Sequence[int], inner_size: Sequence[int], inner_stride: Sequence[int]
) -> tuple[int, tuple[int, ...], tuple[int, ...]] | None:
    """Return the single view that equals a view of the copy of another view, or None if strides cannot express it.

    Args:
        start: The first element of the outer view in the copy.
        size: The outer view's size.
        stride: Its strides in the copy.
        inner_size: The size of the view that was copied.
        inner_stride: Its strides.

    Returns:
        The offset of the single view from the start of the inner view, its size and its strides.
    """
    inner_size, inner_stride = coalesced(inner_size, inner_stride)
    rows = [math.prod(inner_size[dim + 1 :]) for dim in range(len(inner_size))]
    index = [start // row % length for row, length in zip(rows, inner_size, strict=True)]
    reach = list(index)
    lengths: list[int] = []
    steps: list[int] = []
    for length, step in zip(*coalesced(size, stride), strict=True):
        parts: list[tuple[int, int]] = []
        left, at = length, step
        while left > 1:
            if not at:
                parts.append((left, 0))
                break
            dim = next((dim for dim, row in enumerate(rows) if at % row == 0 and at // row < inner_size[dim]), None)
            if dim is None:
                return None
            times = at // rows[dim]
            fitting = left
            if reach[dim] + (left - 1) * times >= inner_size[dim]:
                # The view continues in the dim before, which works only if it goes through this whole dim.
                if reach[dim] or inner_size[dim] % times or left % (inner_size[dim] // times):
                    return None
                fitting = inner_size[dim] // times
            reach[dim] += (fitting - 1) * times
            parts.append((fitting, times * inner_stride[dim]))
            left //= fitting
            at = inner_size[dim] * rows[dim]
        lengths.extend(part[0] for part in reversed(parts))
        steps.extend(part[1] for part in reversed(parts))
    begin = sum(place * step for place, step in zip(index, inner_stride, strict=True))
    return begin, tuple(lengths), tuple(steps)


def grain(size: Sequence[int], stride: Sequence[int], itemsize: int) -> int:
    """Return the number of elements that should be read at a time, so that runs are not short.

    Args:
        size: The view's size.
        stride: Its strides.
        itemsize: The size of an element in bytes.
    """
    size, stride = coalesced(size, stride)
    if 1 not in stride:
        return math.prod(size)
    dim = stride.index(1)
    return min(size[dim], 8 * SHORT_BYTES // itemsize) * math.prod(size[dim + 1 :]) if dim + 1 < len(size) else 1


def read_strided(
    read: Read, dtype: torch.dtype, start: int, size: Sequence[int], stride: Sequence[int], begin: int, out: Tensor
) -> None:
    """Read a range of the elements of a view.

    Args:
        read: The function that reads contiguous ranges of the storage.
        dtype: The dtype of the storage.
        start: The offset of the view in the storage.
        size: The view's size.
        stride: Its strides.
        begin: The first wanted element of the view.
        out: The memory to fill, on the CPU: `(n,)` contiguous, or `(rows, columns)` of any strides if every row is one
            or several whole trailing dims of the view. Elements are cast to its dtype.
    """
    columns = 1 if out.dim() == 1 else out.shape[1]
    size, stride = (coalesced if out.dim() == 1 else _by_rows)(size, stride, *out.shape[1:])
    done = 0
    for index, lengths in boxes(size, begin, begin + out.numel()):
        numel = math.prod(lengths)
        target = out[done // columns : (done + numel) // columns].view(lengths)
        offset = start + sum(place * step for place, step in zip(index, stride, strict=True))
        _read_box(read, dtype, offset, lengths, stride, target)
        done += numel


def _read_box(
    read: Read, dtype: torch.dtype, offset: int, size: Sequence[int], stride: Sequence[int], target: Tensor
) -> None:
    # Repeated elements are read once.
    once = [slice(0, 1) if not step else slice(None) for step in stride]
    if any(not step and length > 1 for length, step in zip(size, stride, strict=True)):
        first = target[tuple(once)]
        _read_box(read, dtype, offset, tuple(first.shape), stride, first)
        target.copy_(first.clone().expand(target.shape))
        return
    dims = sorted((dim for dim in range(len(size)) if size[dim] != 1), key=lambda dim: -stride[dim])
    ordered = target.permute((*dims, *(dim for dim in range(len(size)) if size[dim] == 1)))
    lengths, steps = [size[dim] for dim in dims], [stride[dim] for dim in dims]
    few = math.prod(lengths) <= _FEW_RUNS * _run_numel(lengths, steps)
    _fill(read, dtype, 0 if few else SHORT_BYTES, offset, lengths, steps, ordered.view(lengths or (1,)))


def _fill(
    read: Read, dtype: torch.dtype, short: int, offset: int, size: list[int], stride: list[int], target: Tensor
) -> None:
    """Fill a tensor with dims in the order of descending strides; runs of fewer than `short` bytes are short."""
    if target.is_contiguous() and target.dtype == dtype:
        _pack(read, short, offset, size, stride, target)
        return
    inner = math.prod(size[1:])
    tile_numel = TILE_BYTES // dtype.itemsize
    if inner > tile_numel:
        for place in range(size[0]):
            _fill(read, dtype, short, offset + place * stride[0], size[1:], stride[1:], target[place])
        return
    step = max(1, tile_numel // inner)
    tile = torch.empty(min(step, target.shape[0]) * inner, dtype=dtype, device="cpu")
    for place in range(0, target.shape[0], step):
        part = target[place : place + step]
        held = tile[: part.numel()].view(part.shape)
        _pack(read, short, offset + place * stride[0] if stride else offset, list(part.shape), stride, held)
        part.copy_(held)


def _pack(read: Read, short: int, offset: int, size: list[int], stride: list[int], out: Tensor) -> None:
    """Read into contiguous memory, with dims in the order of descending strides."""
    run = _run_numel(size, stride)
    if run == out.numel():
        read(offset, out.view(-1))
        return
    extent = 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    itemsize = out.element_size()
    if run * itemsize < short and extent * itemsize <= _QUICK_BYTES:
        found = torch.empty(extent, dtype=out.dtype, device="cpu")
        read(offset, found)
        out.copy_(found.as_strided(size, stride))
        return
    # Read several rows at a time if that is quick.
    below = extent - (size[0] - 1) * stride[0]
    step = 1
    if run * itemsize < short and below * itemsize <= _QUICK_BYTES:
        step = max(1, (_QUICK_BYTES // itemsize - below) // stride[0] + 1)
    for place in range(0, size[0], step):
        part = out[place : place + step]
        if step == 1:
            _pack(read, short, offset + place * stride[0], size[1:], stride[1:], part[0])
        else:
            _pack(read, short, offset + place * stride[0], list(part.shape), stride, part)


def _run_numel(size: Sequence[int], stride: Sequence[int]) -> int:
    """Return the number of consecutive elements in a run, with dims in the order of descending strides."""
    run, dim = 1, len(stride)
    while dim and stride[dim - 1] == run:
        dim -= 1
        run *= size[dim]
    return run
