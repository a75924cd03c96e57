"""Bytes at random for the checkpoint readers: `python -m tests.fuzz torch --seconds 60`."""
