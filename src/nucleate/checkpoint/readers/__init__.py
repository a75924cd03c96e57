"""Readers, one for each checkpoint format, and the search for the reader of a path."""

from nucleate.checkpoint.readers.base import Reader
from nucleate.checkpoint.readers.opening import open_checkpoint, reader_for
from nucleate.checkpoint.readers.saved import VALUES, contents_of

__all__ = ["VALUES", "Reader", "contents_of", "open_checkpoint", "reader_for"]
