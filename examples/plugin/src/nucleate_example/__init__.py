"""A strategy, a dimension, a precision, a reader and a writer for nucleate, to copy."""

from nucleate_example.compressed import CompressedStrategy
from nucleate_example.raw import RawReader
from nucleate_example.stochastic import StochasticPrecision
from nucleate_example.vocabulary import VocabularyParallel

__all__ = ["CompressedStrategy", "RawReader", "StochasticPrecision", "VocabularyParallel"]
