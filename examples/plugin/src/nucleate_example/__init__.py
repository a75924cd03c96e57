"""A strategy, a precision and a reader for nucleate, to copy."""

from nucleate_example.compressed import CompressedStrategy
from nucleate_example.raw import RawReader
from nucleate_example.stochastic import StochasticPrecision

__all__ = ["CompressedStrategy", "RawReader", "StochasticPrecision"]
