"""Codebooks of the 4-bit types: the sixteen values, and a table that gives the code of most scaled values directly.

bitsandbytes sorts the sixteen values and searches for each scaled value `s` of [-1, 1] among the fifteen midpoints: the
number of midpoints less than `s` gives the code. Here `s` times `SCALE`, cut to an integer, is the number of a bin, and
a table holds the code of each bin. A bin that contains a midpoint (15 of 80 875) has no code. Its entry in the table is
`UNSURE`, and values in that bin are searched for as in bitsandbytes.

For bfloat16 even those bins are sure. A value and the largest of its block have 8 significant bits each, so their ratio
is one of 128 x 128 numbers times a power of two. `SCALE` is chosen so that no bin has such numbers on both sides of a
midpoint of nf4. (No pair of values comes closer to another code's bin than 4e-6 of itself, twenty times the rounding
error.) Some midpoints of fp4 are such ratios themselves, so their bins stay unsure.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

#: The number of bins from a scaled value of 0 to a scaled value of 1.
SCALE = 40437.6
#: The middle bin's index in the table.
MIDDLE = int(SCALE)
#: An entry of at least this marks a bin without a code.
UNSURE = 16
#: bitsandbytes uses at least this as the largest value of a block (`quantize_4bit` in backends/default/ops.py of
#: bitsandbytes 0.50.2).
SMALLEST = 1e-38

# A relative bound, larger than the rounding error of the four float32 operations that lead to a bin.
_ROUNDING = 1e-6

VALUES = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    # A code is a sign and three bits; the values below are in twelfths.
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}


@dataclass(frozen=True, slots=True)
class Codebook:
    """The tables that give a 4-bit type's codes, for values of one dtype.

    Attributes:
        midpoints: The midpoints between the values, ascending, float32 `(15,)`.
        codes: The codes of the values, in ascending order of the values, uint8 `(16,)`.
        table: The code of each bin, uint8 `(2 * MIDDLE + 1,)`.
        is_sure: Whether all bins have a code.
    """

    midpoints: Tensor
    codes: Tensor
    table: Tensor
    is_sure: bool

    def search(self, scaled: Tensor) -> Tensor:
        """Return the codes of scaled values by searching, as bitsandbytes does. This is exact but slow."""
        return self.codes[torch.bucketize(scaled, self.midpoints)]


@cache
def codebook(quant_type: str, dtype: torch.dtype) -> Codebook:
    """Return the codebook of a 4-bit type (a key of `VALUES`) for values of `dtype`."""
    with torch.inference_mode(False):
        values = torch.tensor(VALUES[quant_type], dtype=torch.float32, device="cpu")
        # fp4 has two zeros, whose order depends on the sort. So the values are sorted as bitsandbytes sorts them.
        order = torch.argsort(values)
        midpoints = (values[order[:-1]] + values[order[1:]]) / 2
        unsure = Codebook(midpoints, order.to(torch.uint8), torch.empty(0, dtype=torch.uint8), False)
        bins = torch.arange(-MIDDLE, MIDDLE + 1, dtype=torch.float64, device="cpu")
        # The middle of each bin: half a bin from the edge nearer to zero. The middle bin reaches from -1 to 1.
        table = unsure.search(((bins + bins.sign() / 2) / SCALE).float())
        for midpoint in midpoints.tolist():
            for index in _bins_near(midpoint):
                table[MIDDLE + index] = UNSURE
        if dtype == torch.bfloat16:
            _make_sure(table, unsure)
        return Codebook(midpoints, unsure.codes, table, not bool((table >= UNSURE).any()))


def _make_sure(table: Tensor, book: Codebook) -> None:
    """Write the codes of bins that are unsure in general, but sure for ratios of bfloat16 values."""
    ratios = _bfloat16_ratios()
    for rank, midpoint in enumerate(book.midpoints.tolist()):
        above = int(torch.searchsorted(ratios, midpoint, right=True))
        lower, upper = abs(ratios[above - 1].item()) * SCALE, abs(ratios[above].item()) * SCALE
        nearer, farther = min(lower, upper), max(lower, upper)
        edge = int(farther * (1 - _ROUNDING))
        # Inverses of huge scales have few bits, and can move a value across a midpoint that is very close to it.
        is_apart = nearer * (1 + _ROUNDING) < abs(midpoint) * SCALE < farther * (1 - _ROUNDING)
        if is_apart and nearer * (1 + _ROUNDING) < edge:
            for index in _bins_near(midpoint):
                is_upper = (abs(index) >= edge) == (midpoint > 0)
                table[MIDDLE + index] = book.codes[rank + is_upper]


def _bins_near(midpoint: float) -> set[int]:
    return {int(midpoint * nearly * SCALE) for nearly in (1 - _ROUNDING, 1 + _ROUNDING)}


def _bfloat16_ratios() -> Tensor:
    """Return scaled values as bitsandbytes rounds them, ascending, without those between zero and the next midpoint."""
    significands = torch.arange(128, 256, device="cpu").float()
    ratios = (significands.unsqueeze(1) * (1 / significands)).reshape(-1)
    ratios = torch.cat([ratios / 2**power for power in range(11)])
    # The largest value of a block may be less than `SMALLEST`, the smallest divisor of bitsandbytes.
    subnormal = torch.arange(128, device="cpu").float() * 2.0**-133 * (1 / torch.tensor(SMALLEST))
    smallest = torch.tensor([2.0**-149], device="cpu")
    scaled = torch.cat([ratios, subnormal, smallest])
    scaled = scaled[scaled <= 1]
    return torch.cat([scaled, -scaled]).sort().values
