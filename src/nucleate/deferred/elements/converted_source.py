"""Converted sources: elements that are converted while they are read, such as a file of full precision to codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nucleate.deferred.elements.conversion import Conversion
from nucleate.deferred.elements.element_source import ElementSource, fill_range_from


class ConvertedSource(ElementSource):
    """One output of the conversion of another element source.

    Args:
        given: The element source that is converted.
        conversion: The conversion.
        number: The number of the output in the conversion's layout.
        dtype: The dtype to which the elements are cast before the conversion; by default, they are not cast.

    Raises:
        ConversionError: The elements cannot be converted.
    """

    def __init__(
        self, given: ElementSource, conversion: Conversion, number: int, dtype: torch.dtype | None = None
    ) -> None:
        self._given = given
        self._conversion = conversion
        self._number = number
        self._source_dtype = dtype or given.dtype
        self._layout = conversion.layout(tuple(given.shape), self._source_dtype)
        self._output = self._layout.outputs[number]
        self.dtype = self._output.dtype
        self.shape = self._output.shape

    def read(self, start: int, out: Tensor) -> None:
        per_block, layout = self._output.per_block, self._layout
        numel = math.prod(self._given.shape)
        last_block = -(-(start + out.numel()) // per_block)
        for first in range(start // per_block, last_block, layout.chunk_blocks):
            last = min(last_block, first + layout.chunk_blocks)
            begin, end = first * layout.block_numel, min(numel, last * layout.block_numel)
            values = torch.empty(end - begin, dtype=self._source_dtype, device="cpu")
            fill_range_from(values, self._given, begin)
            ranges = [output.range(first, last) for output in layout.outputs]
            made = [
                torch.empty(stop - low, dtype=output.dtype, device="cpu")
                for (low, stop), output in zip(ranges, layout.outputs, strict=True)
            ]
            self._conversion.convert(values, made)
            low, stop = ranges[self._number]
            low, stop = max(low, start), min(stop, start + out.numel())
            base = ranges[self._number][0]
            out[low - start : stop - start] = made[self._number][low - base : stop - base]

    def order(self, start: int) -> tuple[int, int]:
        return self._given.order(start // self._output.per_block * self._layout.block_numel)

    def check_unchanged(self) -> None:
        self._given.check_unchanged()

    def describe(self) -> str:
        return f"output {self._number} of {self._conversion!r} of {self._given.describe()} as {self._source_dtype}"
