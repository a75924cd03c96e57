"""The reading of element sources into real tensors, whole or sharded, to load into a model that is set up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nucleate.deferred import ElementSource, RangeMaker, StreamCursors, ordinary
from nucleate.deferred.elements import fill_from
from nucleate.deferred.replay import boxes
from nucleate.layout import boxes_of, is_sharded, local_of
from nucleate.materialize.device_parts import parts_on
from nucleate.materialize.making import make_parts
from nucleate.materialize.parts import Part, parts_of


class GivenBox(ElementSource):
    """A box of an element source.

    Args:
        given: The whole element source.
        offsets: The box's first index in each dim.
        shape: The box's shape.
    """

    def __init__(self, given: ElementSource, offsets: Sequence[int], shape: Sequence[int]) -> None:
        self.dtype = given.dtype
        self.shape = tuple(shape)
        self._given = given
        self._offsets = tuple(offsets)

    def read(self, start: int, out: Tensor) -> None:
        maker, cursors, done = RangeMaker.of(self._given, self.dtype), StreamCursors(None), 0
        for begin, lengths in boxes(self.shape, start, start + out.numel()):
            part = out[done : done + math.prod(lengths)].view(lengths)
            offsets = tuple(map(sum, zip(self._offsets, begin, strict=True)))
            for piece in parts_of(maker, 0, self._given.shape, offsets, part):
                piece.make(cursors)
            done += part.numel()

    def order(self, start: int) -> tuple[int, int]:
        return self._given.order(start)

    def check_unchanged(self) -> None:
        self._given.check_unchanged()

    def describe(self) -> str:
        return f"{self._given.describe()} from {self._offsets} {self.shape}"


@torch.no_grad()
def read_into(pairs: Sequence[tuple[Tensor, ElementSource]]) -> None:
    """Read element sources into real tensors. For a DTensor, read only this rank's part, directly into its place.

    Args:
        pairs: Tensors, each with an element source of the same whole shape. Values are cast to the tensor's dtype.
    """
    parts: list[Part] = []
    rest: list[tuple[Tensor, ElementSource]] = []
    for tensor, given in pairs:
        local = _local(tensor)
        places = _places(tensor, local)
        plain = not (local.is_conj() or local.is_neg()) and all(place.is_contiguous() for _, place in places)
        if plain or local.device.type != "cpu":
            maker = RangeMaker.of(given, local.dtype)
            for begin, place in places:
                parts.extend(parts_on(maker, 0, given.shape, begin, place))
        else:
            rest.append((tensor, given))
    make_parts(parts, torch.get_num_threads())
    for tensor, given in sorted(rest, key=lambda pair: pair[1].order(0)):
        _take(tensor, given)


def _take(tensor: Tensor, given: ElementSource) -> None:
    local = _local(tensor)
    if not is_sharded(tensor):
        fill_from(local, given)
        return
    for begin, place in _places(tensor, local):
        fill_from(place, GivenBox(given, begin, place.shape))


def _places(tensor: Tensor, local: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """Return the first index of each box that this rank holds, with the memory of the box."""
    if not is_sharded(tensor):
        return [((0,) * tensor.dim(), local)]
    return [(box.begin, box.of_local(local)) for box in boxes_of(tensor)]


def _local(tensor: Tensor) -> Tensor:
    # Outside of inference mode torch refuses to write to inference tensors.
    return ordinary(local_of(tensor))
