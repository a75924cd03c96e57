"""Recording: a dispatch mode that writes what a constructor does to a tape. Only `nucleate.deferred` uses it."""

__all__: list[str] = []
