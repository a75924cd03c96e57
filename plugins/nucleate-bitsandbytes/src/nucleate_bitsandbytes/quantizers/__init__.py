"""Conversions that are bit-identical to bitsandbytes, and convert a few blocks of a weight at a time.

On the CPU they are torch code. On other devices bitsandbytes' own kernels convert the blocks.
"""

from nucleate_bitsandbytes.quantizers.double_quant import DoubleQuant
from nucleate_bitsandbytes.quantizers.four_bit import FourBit
from nucleate_bitsandbytes.quantizers.int8_rows import Int8Rows

__all__ = ["DoubleQuant", "FourBit", "Int8Rows"]
