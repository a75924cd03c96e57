"""Writers: what puts a snapshot into files of one format, and what a writer of your own needs for that."""

from nucleate.checkpoint.writers.allocation import create_file
from nucleate.checkpoint.writers.base import Writer
from nucleate.checkpoint.writers.slabs import Place, write_tensors

__all__ = ["Place", "Writer", "create_file", "write_tensors"]
