"""Names on disk: a checkpoint becomes whole or stays absent, and old checkpoints are deleted."""

from nucleate.checkpoint.disk.series import resolve

__all__ = ["resolve"]
