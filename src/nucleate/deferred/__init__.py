"""Deferred initialization: construction is recorded, values are made later. Knows torch only; usable alone."""

from nucleate.deferred.context import Record, deferred, is_recording
from nucleate.deferred.cursors import Cursors
from nucleate.deferred.guard import Handle, handle_of, held_tensors, release
from nucleate.deferred.pieces import Pieces

__all__ = ["Cursors", "Handle", "Pieces", "Record", "deferred", "handle_of", "held_tensors", "is_recording", "release"]
