"""Quantized linear layers: they hold plain parameters, and use the kernels and state dicts of bitsandbytes."""

from nucleate_bitsandbytes.layers.four_bit_weight import FourBitWeight
from nucleate_bitsandbytes.layers.linear4bit import Linear4bit
from nucleate_bitsandbytes.layers.linear8bit import Linear8bit
from nucleate_bitsandbytes.layers.linear8bit_training import Linear8bitTraining

__all__ = ["FourBitWeight", "Linear4bit", "Linear8bit", "Linear8bitTraining"]
