"""Deferred initialization: construction is recorded, values are made later. Knows torch only; usable alone."""

from nucleate.deferred.active import is_recording
from nucleate.deferred.computed_given import ComputedGiven
from nucleate.deferred.context import Record, convert, deferred, eager, give, record_of, resumed
from nucleate.deferred.conversion import Conversion, Layout, Output
from nucleate.deferred.converted_given import ConvertedGiven
from nucleate.deferred.cursors import Cursors
from nucleate.deferred.given import Given
from nucleate.deferred.handle import Handle, handle_of, release
from nucleate.deferred.held import held_tensors
from nucleate.deferred.pieces import Pieces
from nucleate.deferred.plain import plain_modes
from nucleate.deferred.tensor_given import TensorGiven

__all__ = [
    "ComputedGiven",
    "Conversion",
    "ConvertedGiven",
    "Cursors",
    "Given",
    "Handle",
    "Layout",
    "Output",
    "Pieces",
    "Record",
    "TensorGiven",
    "convert",
    "deferred",
    "eager",
    "give",
    "handle_of",
    "held_tensors",
    "is_recording",
    "plain_modes",
    "record_of",
    "release",
    "resumed",
]
