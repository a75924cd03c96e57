"""The state that is saved and loaded: its entries, their places, and their names."""

from nucleate.checkpoint.state.tree import KeyPath, key_of

__all__ = ["KeyPath", "key_of"]
