"""Saving: the state as it is at one moment, and this rank's part of it."""

from nucleate.checkpoint.saving.handle import SaveHandle
from nucleate.checkpoint.saving.snapshot import Snapshot

__all__ = ["SaveHandle", "Snapshot"]
