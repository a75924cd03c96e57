"""Guards: classes of deferred tensors that refuse computation and unrecorded edits until setup."""

from nucleate.deferred.guards.assigned import retie
from nucleate.deferred.guards.guarded import guard
from nucleate.deferred.guards.handle import Handle, handle_of, is_edited, release
from nucleate.deferred.guards.refusals import is_edit, refuse_stale

__all__ = ["Handle", "guard", "handle_of", "is_edit", "is_edited", "refuse_stale", "release", "retie"]
