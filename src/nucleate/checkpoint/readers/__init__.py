"""Readers, one for each checkpoint format, and the search for the reader of a path."""

from nucleate.checkpoint.readers.base import Reader
from nucleate.checkpoint.readers.one_save import agree_on_save, open_saved
from nucleate.checkpoint.readers.opening import open_checkpoint, reader_for
from nucleate.checkpoint.readers.saved import VALUES, contents_of

__all__ = ["VALUES", "Reader", "agree_on_save", "contents_of", "open_checkpoint", "open_saved", "reader_for"]
