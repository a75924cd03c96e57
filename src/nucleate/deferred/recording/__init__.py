"""Recording: a dispatch mode that writes a constructor's operations to a tape. Only `nucleate.deferred` uses it."""

__all__: list[str] = []
