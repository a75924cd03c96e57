"""The state that is saved and loaded: what it consists of, where each part stands, and what it is called."""

from nucleate.checkpoint.state.tree import KeyPath, key_of

__all__ = ["KeyPath", "key_of"]
