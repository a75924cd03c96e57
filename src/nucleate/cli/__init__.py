"""The command `nucleate`: it inspects, converts and verifies checkpoints."""

from nucleate.cli.command import main

__all__ = ["main"]
