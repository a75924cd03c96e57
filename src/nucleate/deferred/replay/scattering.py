"""Scattering: elements are written to the places that they would be read from.

If a tensor is made from others only by moving elements, the origin of each of its elements is known. So a process that
holds a part of the tensor can write that part to its places in the others, and needs none of these tensors whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor

from nucleate.deferred.elements.element_source import ElementSource
from nucleate.deferred.replay.strided import boxes, coalesced
from nucleate.deferred.replay.writes import Copied, Joined, RangedStorage, Read, TensorView, derived_source

# Longer rows are written one by one.
_LONG_ROW_NUMEL = 1 << 12

#: `(given, start, values)`: the one-dimensional `values` are the elements of `given` from `start` on.
Write = Callable[[ElementSource, int, Tensor], None]


def scatter(source: TensorView, begin: int, values: Tensor, write: Write) -> None:
    """Write a range of a tensor to the places that it comes from.

    Args:
        source: The tensor. Each of its elements comes unchanged from one place.
        begin: The first element of the range.
        values: The elements of the range, one-dimensional and contiguous. They may be copied.
        write: The function to call for each part that goes to one place.
    """
    if source.size is None:
        _scatter(source.maker, source.start + begin, values, write)
        return
    size, stride = coalesced(source.size, source.stride)
    done = 0
    for index, lengths in boxes(size, begin, begin + values.numel()):
        numel = math.prod(lengths)
        offset = source.start + sum(place * step for place, step in zip(index, stride, strict=True))
        _scatter_box(source.maker, offset, lengths, stride, values[done : done + numel].view(lengths), write)
        done += numel


def _scatter_box(
    maker: RangedStorage, offset: int, size: Sequence[int], stride: Sequence[int], values: Tensor, write: Write
) -> None:
    dims = sorted((dim for dim in range(len(size)) if size[dim] != 1), key=lambda dim: -stride[dim])
    ordered = values.permute((*dims, *(dim for dim in range(len(size)) if size[dim] == 1))).contiguous()
    run, inner = 1, len(dims)
    while inner and stride[dims[inner - 1]] == run:
        inner -= 1
        run *= size[dims[inner]]
    rows = ordered.view(-1, run)
    for row, index in enumerate(itertools.product(*(range(size[dim]) for dim in dims[:inner]))):
        start = offset + sum(place * stride[dim] for place, dim in zip(index, dims, strict=False))
        _scatter(maker, start, rows[row], write)


def _scatter(maker: RangedStorage, start: int, values: Tensor, write: Write) -> None:
    assert len(maker.writes) == 1
    only = maker.writes[0]
    assert (only.start, only.stop) == (0, maker.numel)
    if isinstance(only, Read):
        source = derived_source(only.given)
        if source is None:
            write(only.given, only.first + start, values)
        else:
            scatter(source, only.first + start, values, write)
    elif isinstance(only, Copied):
        assert isinstance(only.source, TensorView)
        scatter(only.source, start, values, write)
    else:
        assert isinstance(only, Joined)
        _scatter_joined(only, start, values, write)


def _scatter_joined(joined: Joined, start: int, values: Tensor, write: Write) -> None:
    done, bounds, width = 0, joined.bounds, joined.width
    while done < values.numel():
        row, column = divmod(start + done, width)
        num_rows = (values.numel() - done) // width
        whole = num_rows if not column and num_rows else 1
        stop = done + whole * width if not column and num_rows else min(values.numel(), done + width - column)
        part = values[done:stop].view(whole, -1)
        for source, first, last in zip(joined.sources, bounds, bounds[1:], strict=False):
            low, high = max(first, column), min(last, column + part.shape[1])
            if low >= high:
                continue
            wanted = part[:, low - column : high - column]
            # Long rows are written one by one, short rows as one copy of them all.
            stretches = wanted if high - low >= _LONG_ROW_NUMEL else [wanted.contiguous().view(-1)]
            at = row * (last - first) + low - first
            for stretch in stretches:
                scatter(source, at, stretch, write)
                at += last - first
        done = stop
