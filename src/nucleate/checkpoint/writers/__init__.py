"""Writers: what puts a snapshot into files of one format."""

from nucleate.checkpoint.writers.base import Writer

__all__ = ["Writer"]
