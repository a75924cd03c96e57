"""The active integrations of a `Runtime`: the given ones, or those whose library has been imported."""

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
        choices: The argument of `Runtime(plugins=...)`; None takes each integration whose library has been imported.
        composition: The composition that each integration checks.

    Raises:
        PluginNotFoundError: No integration has a given name.
        ConfigurationError: `choices` is not a list, or an integration does not work with the composition.
    """

    def __init__(self, choices: Sequence[str | Integration] | None, composition: Composition) -> None:
        if isinstance(choices, (str, Integration)):
            raise ConfigurationError(f"plugins={choices!r} must be a list, such as [{choices!r}].")
        self._composition = composition
        self._takes_all = choices is None
        self._is_connected = False
        # The active integrations by name. The others are not imported, because they may never be needed.
        self._active: dict[str, Integration] = {}
        for choice in choices or ():
            self._add(cast(Integration, INTEGRATIONS.choose(choice)))

    def connect(self) -> None:
        """Tell each integration that the process group has started."""
        self._is_connected = True
        for integration in self._active.values():
            integration.connect(self._composition.device, self._composition.environment)

    def __iter__(self) -> Iterator[Integration]:
        """Yield the integrations that are active now; a library may have been imported since the last call."""
        if self._takes_all:
            for name in INTEGRATIONS.names():
                if name in sys.modules and name not in self._active:
                    self._add(cast(Integration, INTEGRATIONS.create(name)))
        return iter(list(self._active.values()))

    def _add(self, integration: Integration) -> None:
        integration.check(self._composition)
        if self._is_connected:
            integration.connect(self._composition.device, self._composition.environment)
        self._active[integration.name] = integration
