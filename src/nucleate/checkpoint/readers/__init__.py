"""Readers: what tells what a file or folder of one format holds, and the way to the right one."""

from nucleate.checkpoint.readers.base import Reader
from nucleate.checkpoint.readers.opening import open_checkpoint, reader_for

__all__ = ["Reader", "open_checkpoint", "reader_for"]
