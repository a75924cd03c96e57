"""Integrations of other libraries. A new one implements `Integration` and registers under `nucleate.integrations`."""

from nucleate.integrations.base import Integration

__all__ = ["Integration"]
