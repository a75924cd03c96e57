"""Element sources: values that a deferred tensor takes from outside of its recipe, such as from a file."""

from nucleate.deferred.elements.conversion import Conversion, Layout, Output
from nucleate.deferred.elements.converted_source import ConvertedSource
from nucleate.deferred.elements.element_source import ElementSource, fill_from, fill_range_from
from nucleate.deferred.elements.tensor_source import TensorSource

__all__ = [
    "Conversion",
    "ConvertedSource",
    "ElementSource",
    "Layout",
    "Output",
    "TensorSource",
    "fill_from",
    "fill_range_from",
]
