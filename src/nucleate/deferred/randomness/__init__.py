"""Random numbers: where in a generator's stream each random step stands, and how any range of it is drawn."""

from nucleate.deferred.randomness.cursors import Cursors
from nucleate.deferred.randomness.fills import is_contiguous
from nucleate.deferred.randomness.mersenne_twister import Workspace, draw
from nucleate.deferred.randomness.program import RandomProgram
from nucleate.deferred.randomness.streams import moved

__all__ = ["Cursors", "RandomProgram", "Workspace", "draw", "is_contiguous", "moved"]
