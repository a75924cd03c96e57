"""Tools that work on files alone. Each is imported when it is used: see `nucleate.checkpoint` and `nucleate.cli`."""

__all__: list[str] = []
