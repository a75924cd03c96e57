"""How models of other libraries are made here. A new way implements `Integration`, under `nucleate.integrations`."""

from nucleate.integrations.base import Integration

__all__ = ["Integration"]
