"""Elements that a deferred tensor takes from somewhere else, such as a file, instead of from a recipe."""

from nucleate.deferred.elements.conversion import Conversion, Layout, Output
from nucleate.deferred.elements.converted import ConvertedGiven
from nucleate.deferred.elements.real_tensor import TensorGiven
from nucleate.deferred.elements.source import Given, take, take_range

__all__ = ["Conversion", "ConvertedGiven", "Given", "Layout", "Output", "TensorGiven", "take", "take_range"]
