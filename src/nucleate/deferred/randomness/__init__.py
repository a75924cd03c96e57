"""Random numbers: the position of each random step in a generator's stream, and draws of any range of a step."""

from nucleate.deferred.randomness.fills import is_contiguous
from nucleate.deferred.randomness.mersenne_twister import Workspace, draw
from nucleate.deferred.randomness.program import RandomProgram
from nucleate.deferred.randomness.stream_cursors import StreamCursors
from nucleate.deferred.randomness.streams import moved

__all__ = ["RandomProgram", "StreamCursors", "Workspace", "draw", "is_contiguous", "moved"]
