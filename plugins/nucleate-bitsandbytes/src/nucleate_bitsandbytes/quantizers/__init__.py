"""Conversions that make the bits of bitsandbytes, some blocks of a weight at a time.

On the CPU they are torch code; on other devices bitsandbytes' own kernels run on the blocks.
"""

from nucleate_bitsandbytes.quantizers.double_quant import DoubleQuant
from nucleate_bitsandbytes.quantizers.four_bit import FourBit
from nucleate_bitsandbytes.quantizers.int8_rows import Int8Rows

__all__ = ["DoubleQuant", "FourBit", "Int8Rows"]
