"""Tools that work on files alone. `nucleate.checkpoint` and `nucleate.cli` import each tool at its first use."""

__all__: list[str] = []
