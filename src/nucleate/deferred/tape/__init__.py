"""The tape: the recorded operations on the tensors of a construction, as plain data."""

from nucleate.deferred.tape.coverage import is_written
from nucleate.deferred.tape.leaves import map_leaves, tensors
from nucleate.deferred.tape.steps import Constant, Position, Run, Step, TensorRef
from nucleate.deferred.tape.tape import Tape

__all__ = ["Constant", "Position", "Run", "Step", "Tape", "TensorRef", "is_written", "map_leaves", "tensors"]
