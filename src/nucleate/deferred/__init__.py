"""Deferred initialization: construction is recorded, values are made later. Knows torch only; usable alone.

From below: `elements` (what is taken from files and the like), `tape` (what was done, as data), `active` (which
recordings are on), `randomness`, `replay` (values of what is on a tape), `recording`, `guards` (deferred tensors
between construction and setup), `impersonation` (what Python sees of them), `record` and `context`.
"""

from nucleate.deferred.active import is_recording
from nucleate.deferred.computed import ComputedGiven
from nucleate.deferred.context import convert, deferred, eager, give, resumed
from nucleate.deferred.elements.conversion import Conversion, Layout, Output
from nucleate.deferred.elements.converted import ConvertedGiven
from nucleate.deferred.elements.real_tensor import TensorGiven
from nucleate.deferred.elements.source import Given
from nucleate.deferred.guards.handle import Handle, handle_of, release
from nucleate.deferred.module_tensors import held_tensors
from nucleate.deferred.randomness.cursors import Cursors
from nucleate.deferred.record import Record, record_of
from nucleate.deferred.replay.ranges import Pieces
from nucleate.deferred.torch_modes import plain_modes

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
