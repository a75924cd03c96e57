"""The integrations that a `Runtime` uses: those that it was given, or those whose library has been imported."""

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
        choices: What `Runtime(plugins=...)` was given; None takes each whose library has been imported.
        composition: What each is shown.

    Raises:
        PluginNotFoundError: No integration has a name that was given.
        ConfigurationError: They were not given as a list, or one does not work with the composition.
    """

    def __init__(self, choices: Sequence[str | Integration] | None, composition: Composition) -> None:
        if isinstance(choices, (str, Integration)):
            raise ConfigurationError(f"plugins={choices!r} must be a list, such as [{choices!r}].")
        self._composition = composition
        self._takes_all = choices is None
        self._is_connected = False
        # Those that are active by now, by name. The others may never be needed: they are looked up, not imported.
        self._active: dict[str, Integration] = {}
        for choice in choices or ():
            self._add(cast(Integration, INTEGRATIONS.choose(choice)))

    def connect(self) -> None:
        """Tell each that the process group has started."""
        self._is_connected = True
        for integration in self._active.values():
            integration.connect(self._composition.device, self._composition.environment)

    def __iter__(self) -> Iterator[Integration]:
        """Yield those that are active now; a library may have been imported since."""
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
