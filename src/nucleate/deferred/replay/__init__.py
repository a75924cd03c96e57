"""Replay: the values of what is on a tape, whole or in ranges."""

from nucleate.deferred.replay.live_writes import pieces_of
from nucleate.deferred.replay.ranges import Pieces
from nucleate.deferred.replay.replayer import Replayer, backward_slice, view
from nucleate.deferred.replay.scattering import scatter
from nucleate.deferred.replay.strided import boxes
from nucleate.deferred.replay.writes import Derived, Source, derived_source

__all__ = [
    "Derived",
    "Pieces",
    "Replayer",
    "Source",
    "backward_slice",
    "boxes",
    "derived_source",
    "pieces_of",
    "scatter",
    "view",
]
