"""Replay: the values of the storages on a tape, made whole or in ranges."""

from nucleate.deferred.replay.live_writes import maker_of
from nucleate.deferred.replay.ranges import RangeMaker
from nucleate.deferred.replay.replayer import Replayer, backward_slice, view
from nucleate.deferred.replay.scattering import scatter
from nucleate.deferred.replay.strided import boxes
from nucleate.deferred.replay.writes import Derived, TensorView, derived_source

__all__ = [
    "Derived",
    "RangeMaker",
    "Replayer",
    "TensorView",
    "backward_slice",
    "boxes",
    "derived_source",
    "maker_of",
    "scatter",
    "view",
]
