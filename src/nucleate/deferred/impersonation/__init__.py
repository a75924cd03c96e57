"""Impersonation: deferred tensors look like tensors of their device. Only `nucleate.deferred` uses it."""

__all__: list[str] = []
