"""Deferred initialization: the construction of a model is recorded, and its values are made later.

The package needs only torch and is usable alone. Its parts, from the lowest layer up: `elements` (element
sources, such as files), `tape` (recorded operations as data), `active` (the recordings that are on), `randomness`,
`replay` (the values of the storages on a tape), `recording`, `guards` (deferred tensors between construction and
setup), `impersonation` (deferred tensors as Python sees them), `record` and `context`.
"""

from nucleate.deferred.active import is_recording
from nucleate.deferred.computed_source import ComputedSource
from nucleate.deferred.context import bind, bind_all, convert, deferred, eager, resumed
from nucleate.deferred.elements.conversion import Conversion, Layout, Output
from nucleate.deferred.elements.converted_source import ConvertedSource
from nucleate.deferred.elements.element_source import ElementSource
from nucleate.deferred.elements.tensor_source import TensorSource
from nucleate.deferred.guards.handle import Handle, handle_of, release
from nucleate.deferred.inference_mode import ordinary, outside_inference_mode
from nucleate.deferred.module_tensors import held_tensors
from nucleate.deferred.randomness.stream_cursors import StreamCursors
from nucleate.deferred.record import Record, record_of
from nucleate.deferred.replay.ranges import RangeMaker
from nucleate.deferred.torch_modes import plain_modes

__all__ = [
    "ComputedSource",
    "Conversion",
    "ConvertedSource",
    "ElementSource",
    "Handle",
    "Layout",
    "Output",
    "RangeMaker",
    "Record",
    "StreamCursors",
    "TensorSource",
    "bind",
    "bind_all",
    "convert",
    "deferred",
    "eager",
    "handle_of",
    "held_tensors",
    "is_recording",
    "ordinary",
    "outside_inference_mode",
    "plain_modes",
    "record_of",
    "release",
    "resumed",
]
