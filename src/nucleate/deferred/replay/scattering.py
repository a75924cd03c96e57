"""Scattering: elements are written to where they would be read from.

A tensor that is made of others by moving elements says of each of its elements where it comes from. So whoever holds a
part of such a tensor can write that part to its places in the others, without holding a whole of anything.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor

from nucleate.deferred.elements.source import Given
from nucleate.deferred.replay.strided import boxes, coalesced
from nucleate.deferred.replay.writes import Copied, Joined, RangedStorage, Read, Source, derived_source

# Longer rows are written one by one.
_LONG_ROW_NUMEL = 1 << 12

#: `(given, start, values)`: the elements of `given` from `start` on are `values`, one-dimensional.
Write = Callable[[Given, int, Tensor], None]


def scatter(source: Source, begin: int, values: Tensor, write: Write) -> None:
    """Write a range of a tensor to where it comes from.

    Args:
        source: The tensor, of which every element comes from one place, unchanged.
        begin: The first element of the range.
        values: The range, one-dimensional and contiguous. It may be copied.
        write: Called for each part that goes to one place.
    """
    if source.size is None:
        _scatter(source.pieces, source.start + begin, values, write)
        return
    size, stride = coalesced(source.size, source.stride)
    done = 0
    for index, lengths in boxes(size, begin, begin + values.numel()):
        numel = math.prod(lengths)
        offset = source.start + sum(place * step for place, step in zip(index, stride, strict=True))
        _scatter_box(source.pieces, offset, lengths, stride, values[done : done + numel].view(lengths), write)
        done += numel


def _scatter_box(
    pieces: RangedStorage, offset: int, size: Sequence[int], stride: Sequence[int], values: Tensor, write: Write
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
        _scatter(pieces, start, rows[row], write)


def _scatter(pieces: RangedStorage, start: int, values: Tensor, write: Write) -> None:
    assert len(pieces.writes) == 1
    only = pieces.writes[0]
    assert (only.start, only.stop) == (0, pieces.numel)
    if isinstance(only, Read):
        source = derived_source(only.given)
        if source is None:
            write(only.given, only.first + start, values)
        else:
            scatter(source, only.first + start, values, write)
    elif isinstance(only, Copied):
        assert isinstance(only.source, Source)
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
            # Long rows as they are, short ones as a copy of all.
            stretches = wanted if high - low >= _LONG_ROW_NUMEL else [wanted.contiguous().view(-1)]
            at = row * (last - first) + low - first
            for stretch in stretches:
                scatter(source, at, stretch, write)
                at += last - first
        done = stop
