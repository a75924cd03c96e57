"""Readers: what tells what a file or folder of one format holds, and the way to the right one."""

from nucleate.checkpoint.readers.base import Reader
from nucleate.checkpoint.readers.opening import open_checkpoint, reader_for
from nucleate.checkpoint.readers.saved import VALUES, contents_of

__all__ = ["VALUES", "Reader", "contents_of", "open_checkpoint", "reader_for"]
