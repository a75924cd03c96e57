"""Saving: the state at one moment, and this rank's part of the state."""

from nucleate.checkpoint.saving.handle import SaveHandle
from nucleate.checkpoint.saving.snapshot import Snapshot

__all__ = ["SaveHandle", "Snapshot"]
