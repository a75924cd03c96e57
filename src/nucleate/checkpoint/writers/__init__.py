"""Writers, one for each checkpoint format, and the functions that a writer of your own needs."""

from nucleate.checkpoint.writers.allocation import create_file
from nucleate.checkpoint.writers.base import Writer
from nucleate.checkpoint.writers.slabs import Place, write_tensors

__all__ = ["Place", "Writer", "create_file", "write_tensors"]
