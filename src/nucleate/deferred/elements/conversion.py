"""Conversions: one tensor becomes several others, a few blocks of elements at a time.

The main use is quantization: a weight becomes codes and scales. A conversion is plain torch code on a few blocks.
`convert` records it on a deferred tensor. Materialization then makes a range of that tensor, converts the range and
frees it. So the tensor itself is never whole in memory, several threads can convert one tensor, and a rank converts
only its own part.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

#: A conversion gets about this many elements at a time: enough that Python's work between two calls does not count, and
#: so few that no large tensor is ever whole. A conversion may cut them smaller.
CHUNK_NUMEL = 1 << 20


@dataclass(frozen=True, slots=True)
class Output:
    """One of the tensors that a conversion makes.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        per_block: The number of its elements, in the order of their indices, that come from one block. The last block
            may be incomplete and make fewer.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    per_block: int

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    def range(self, first_block: int, last_block: int) -> tuple[int, int]:
        """Return the start and stop of the elements that come from the blocks `[first_block, last_block)`."""
        return min(self.numel, first_block * self.per_block), min(self.numel, last_block * self.per_block)


@dataclass(frozen=True, slots=True)
class Layout:
    """The blocks into which a conversion cuts a tensor, and the tensors that it makes.

    Attributes:
        block_numel: The number of consecutive elements that are converted together, independently of other elements.
        outputs: The tensors that the conversion makes.
    """

    block_numel: int
    outputs: tuple[Output, ...]

    @property
    def chunk_blocks(self) -> int:
        """The number of blocks that are converted at a time."""
        return max(1, CHUNK_NUMEL // self.block_numel)

    def num_blocks(self, numel: int) -> int:
        """Return the number of blocks, including an incomplete last one."""
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
            last: The block behind the last one.
        """
        parts = [out[slice(*output.range(first, last))] for out, output in zip(outs, self.outputs, strict=True)]
        conversion.convert(values[first * self.block_numel : last * self.block_numel], parts)


class Conversion(ABC):
    """A rule that makes several tensors from one.

    A subclass is a frozen dataclass of plain values: ranks compare conversions by their `repr`.
    """

    @abstractmethod
    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        """Return the blocks and the outputs for a tensor.

        Args:
            shape: The tensor's shape.
            dtype: Its dtype.

        Raises:
            ConversionError: The tensor cannot be converted.
        """

    @abstractmethod
    def convert(self, values: Tensor, outs: Sequence[Tensor]) -> None:
        """Convert some blocks. Called by several threads at once, for different blocks.

        Args:
            values: One-dimensional and contiguous, on the device of the model: a number of whole blocks, or all that
                follows up to the end of the tensor. The method must not write to it.
            outs: The memory to fill: for each output the elements that come from these blocks, one-dimensional and
                contiguous.

        Raises:
            ConversionError: The values cannot be converted. The code that catches the error adds the parameter's name.
        """


def converted(tensor: Tensor, conversion: Conversion) -> tuple[Tensor, ...]:
    """Convert a whole real tensor; on the CPU, several threads share the work.

    Args:
        tensor: The tensor.
        conversion: The conversion.

    Raises:
        ConversionError: The tensor cannot be converted.
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
