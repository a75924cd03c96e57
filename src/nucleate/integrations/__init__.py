"""Integrations of other libraries. A new one implements `Integration` and registers under `nucleate.integrations`.

`declare_shell` tells nucleate which modules of a library only wrap another module.
"""

from nucleate.integrations.base import Integration
from nucleate.shells import declare_shell

__all__ = ["Integration", "declare_shell"]
