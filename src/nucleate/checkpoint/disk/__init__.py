"""Names on disk: a checkpoint becomes whole or stays absent there, and old ones go."""

from nucleate.checkpoint.disk.series import resolve

__all__ = ["resolve"]
