"""Stored tensors: the contents of a checkpoint, and the files that hold the bytes."""

from nucleate.checkpoint.stored.chunk import Chunk
from nucleate.checkpoint.stored.contents import Contents
from nucleate.checkpoint.stored.data_file import Bytes, DataFile, HeldBytes, first_bytes
from nucleate.checkpoint.stored.tensor import StoredTensor

__all__ = ["Bytes", "Chunk", "Contents", "DataFile", "HeldBytes", "StoredTensor", "first_bytes"]
