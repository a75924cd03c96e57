"""Conversions: how one tensor becomes several others, some blocks of its elements at a time.

Quantization is the case that matters: a weight becomes codes and scales. A conversion is plain torch code on a few
blocks; `convert` records it on a deferred tensor, and whoever makes the results makes a range of the tensor, converts
it and forgets it. So the tensor itself is never whole in memory, several threads convert one, and a rank converts what
it owns of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

#: About so many elements are handed to a conversion at a time: many enough that what Python does between two calls does
#: not count, few enough that nothing large is ever whole. A conversion may cut them smaller.
CHUNK_NUMEL = 1 << 20


@dataclass(frozen=True, slots=True)
class Output:
    """One of the tensors that a conversion makes.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        per_block: How many of its elements, in the order of their indices, come from one block. The last block may be
            cut short, and make fewer.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    per_block: int

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def range(self, first_block: int, last_block: int) -> tuple[int, int]:
        """Return which elements come from the blocks `[first_block, last_block)`."""
        return min(self.numel, first_block * self.per_block), min(self.numel, last_block * self.per_block)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a conversion cuts a tensor up, and what it makes of it.

    Attributes:
        block_numel: How many elements that follow one another are converted together, without looking at others.
        outputs: What is made.
    """

    block_numel: int
    outputs: tuple[Output, ...]

    @property
    def chunk_blocks(self) -> int:
        """How many blocks are converted at a time."""
        return max(1, CHUNK_NUMEL // self.block_numel)

    def num_blocks(self, numel: int) -> int:
        """Return how many blocks there are, a last one that is cut short included."""
        return -(-numel // self.block_numel)

    def convert_blocks(
        self, conversion: Conversion, values: Tensor, outs: Sequence[Tensor], first: int, last: int
    ) -> None:
        """Convert the blocks `[first, last)` of a whole tensor.

        Args:
            conversion: The conversion.
            values: All values, one-dimensional.
            outs: The whole outputs, one-dimensional.
            first: The first block.
            last: The one behind the last.
        """
        parts = [out[slice(*output.range(first, last))] for out, output in zip(outs, self.outputs, strict=True)]
        conversion.convert(values[first * self.block_numel : last * self.block_numel], parts)


class Conversion(ABC):
    """How one tensor becomes several others.

    A subclass is a frozen dataclass of plain values: ranks compare conversions by their `repr`.
    """

    @abstractmethod
    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """Return what becomes of a tensor.

        Args:
            shape: The tensor's shape.
            dtype: Its dtype.

        Raises:
            ConversionError: It cannot be converted.
        """

    @abstractmethod
    def convert(self, values: Tensor, outs: Sequence[Tensor]) -> None:
        """Convert some blocks. Called by several threads at once, for different blocks.

        Args:
            values: One-dimensional and contiguous, on the device of the model: a number of whole blocks, or all up to
                the end of the tensor. It must not be written to.
            outs: What to fill, one-dimensional and contiguous: of each output the elements that come from these blocks.

        Raises:
            ConversionError: The values cannot be converted. Whoever catches it adds the parameter's name.
        """


def converted(tensor: Tensor, conversion: Conversion) -> tuple[Tensor, ...]:
    """Convert a whole real tensor, by several threads where it is on the CPU.

    Args:
        tensor: The tensor.
        conversion: What to make of it.

    Raises:
        ConversionError: It cannot be converted.
    """
    layout = conversion.layout(tuple(tensor.shape), tensor.dtype)
    outs = tuple(torch.empty(out.shape, dtype=out.dtype, device=tensor.device) for out in layout.outputs)
    values, flat = tensor.detach().reshape(-1), [out.view(-1) for out in outs]
    num_blocks = layout.num_blocks(values.numel())
    if values.device.type != "cpu" or values.is_meta:
        if not values.is_meta and num_blocks:
            conversion.convert(values, flat)
        return outs
    step = layout.chunk_blocks
    num_threads = max(1, min(torch.get_num_threads(), num_blocks // step))
    share = -(-num_blocks // num_threads) if num_blocks else 1

    def convert_share(first: int) -> None:
        last = min(num_blocks, first + share)
        for block in range(first, last, step):
            layout.convert_blocks(conversion, values, flat, block, min(last, block + step))

    with torch.no_grad():
        if num_threads == 1:
            convert_share(0)
            return outs
    inference = torch.is_inference_mode_enabled()

    def in_thread(first: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            convert_share(first)

    with ThreadPoolExecutor(num_threads, thread_name_prefix="nucleate-convert") as pool:
        for done in [pool.submit(in_thread, first) for first in range(0, num_blocks, share)]:
            done.result()
    return outs
