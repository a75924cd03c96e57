"""A small conversion for tests: rows of int8 codes with a scale each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nucleate.deferred import Conversion, Layout, Output
from nucleate.errors import ConversionError


@dataclass(frozen=True)
class Rows(Conversion):
    """Each row becomes int8 codes and one scale."""

    limit: float = 127.0

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        if len(shape) != 2:
            raise ConversionError(f"only matrices have rows, this has the shape {shape}")
        return Layout(shape[1], (Output(shape, torch.int8, shape[1]), Output(shape[:1], torch.float32, 1)))

    def convert(self, values: Tensor, outs: Sequence[Tensor]) -> None:
        codes, scales = outs
        rows = values.view(scales.numel(), -1).float()
        torch.amax(rows.abs(), 1, out=scales)
        if not bool(scales.isfinite().all()):
            raise ConversionError("it holds a value that is not finite")
        codes.view(rows.shape).copy_(torch.round(rows * (self.limit / scales)[:, None]))


@dataclass(frozen=True)
class Blocks(Conversion):
    """Each stretch of 10 elements, whatever the rows are, becomes its sum; and pairs of elements their sums."""

    def layout(self, shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        numel = torch.Size(shape).numel()
        sums, pairs = -(-numel // 10), -(-numel // 2)
        return Layout(10, (Output((pairs, 1), torch.float64, 5), Output((sums,), torch.float64, 1)))

    def convert(self, values: Tensor, outs: Sequence[Tensor]) -> None:
        pairs, sums = outs
        padded = torch.zeros(sums.numel() * 10, dtype=torch.float64)
        padded[: values.numel()] = values
        sums.copy_(padded.view(-1, 10).sum(1))
        pairs.copy_(padded.view(-1, 2).sum(1)[: pairs.numel()])
