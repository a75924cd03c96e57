"""The active integrations of a `Runtime`: the given ones and the built-in ones, or all whose library was imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import cast

from nucleate.errors import ConfigurationError
from nucleate.integrations.base import Integration
from nucleate.plugin import Composition
from nucleate.registry import INTEGRATIONS


class Integrations:
    """The integrations of one `Runtime`.

    Args:
        choices: The integrations among `Runtime(plugins=...)`, and names of integrations. Of the others, the built-in
            ones stay active, which serve torch's own files and those of readers of files. None takes each integration
            whose library has been imported.
        composition: The composition that each integration checks.

    Raises:
        PluginNotFoundError: No integration has a given name.
        ConfigurationError: Two choices have one name, or an integration does not work with the composition.
    """

    def __init__(self, choices: Sequence[str | Integration] | None, composition: Composition) -> None:
        self._composition = composition
        self._takes_all = choices is None
        self._is_connected = False
        # The active integrations by name. The others are not imported, because they may never be needed.
        self._active: dict[str, Integration] = {}
        for choice in choices or ():
            integration = cast(Integration, INTEGRATIONS.choose(choice))
            if integration.name in self._active:
                raise ConfigurationError(f"plugins has two integrations named {integration.name!r}. Give one.")
            self._add(integration)

    def connect(self) -> None:
        """Tell each integration that the process group has started."""
        self._is_connected = True
        for integration in self._active.values():
            integration.connect(self._composition.device, self._composition.environment)

    def __iter__(self) -> Iterator[Integration]:
        """Yield the integrations that are active now; a library may have been imported since the last call."""
        for name in INTEGRATIONS.names() if self._takes_all else sorted(INTEGRATIONS.builtins):
            if name in sys.modules and name not in self._active:
                self._add(cast(Integration, INTEGRATIONS.create(name)))
        return iter(list(self._active.values()))

    def _add(self, integration: Integration) -> None:
        integration.check(self._composition)
        if self._is_connected:
            integration.connect(self._composition.device, self._composition.environment)
        self._active[integration.name] = integration
