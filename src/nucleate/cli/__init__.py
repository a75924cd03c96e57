"""The command `nucleate`: looks into checkpoints, converts them, and verifies them."""

from nucleate.cli.command import main

__all__ = ["main"]
