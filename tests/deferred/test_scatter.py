"""What is scattered comes back when it is read: every element at its place, once."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from hypothesis import given as forall
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from nucleate.deferred import ComputedSource, ElementSource, deferred
from nucleate.deferred.replay.scattering import scatter
from tests.deferred.test_computed_given import held, stand_ins


@forall(st.data())
@settings(max_examples=200, deadline=None)
def test_any_parts_of_a_moved_tensor_go_where_they_come_from(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    files = [held(*shape), held(*shape)]
    with deferred():
        tensors = stand_ins(files)
        for _ in range(data.draw(st.integers(1, 4))):
            tensors = _bijection(data.draw, tensors)
        givens = [ComputedSource(tensor) for tensor in tensors]
    written = [torch.zeros(math.prod(shape)) for _ in files]

    def write(given: ElementSource, start: int, values: Tensor) -> None:
        place = next(number for number, file in enumerate(files) if file is given)
        assert values.is_contiguous()
        assert not written[place][start : start + values.numel()].any(), "written twice"
        written[place][start : start + values.numel()] = values

    for given in givens:
        values = torch.empty(math.prod(given.shape))
        given.read(0, values)
        source = given.source()
        assert source is not None
        cuts = sorted({0, values.numel(), *data.draw(st.lists(st.integers(0, values.numel()), max_size=3))})
        for start, stop in itertools.pairwise(cuts):
            scatter(source, start, values[start:stop], write)
    for file, found in zip(files, written, strict=True):
        assert torch.equal(found, file.tensor.view(-1))


def _bijection(draw: Any, tensors: list[Tensor]) -> list[Tensor]:
    """Move all elements of some tensors into others."""
    first = tensors[0]
    dim = draw(st.integers(0, first.dim() - 1))
    kind = draw(st.sampled_from(["transpose", "split", "cat", "stack", "reshape", "interleave"]))
    equal = all(tensor.shape == first.shape for tensor in tensors)
    if kind == "transpose":
        return [first.transpose(0, dim), *tensors[1:]]
    if kind == "split":
        return [*first.split(draw(st.integers(1, first.shape[dim])), dim), *tensors[1:]]
    if kind == "cat" and equal:
        return [torch.cat(tensors, dim)]
    if kind == "stack" and equal:
        return [torch.stack(tensors, dim)]
    if kind == "interleave" and equal:
        pairs = zip(*(tensor.split(1, dim) for tensor in tensors), strict=True)
        return [torch.cat([part for pair in pairs for part in pair], dim)]
    return [first.reshape(-1, first.shape[-1]), *tensors[1:]]
