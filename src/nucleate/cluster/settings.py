"""The settings of a machine, which a script cannot know: environment variables that begin with `NUCLEATE_`."""

from __future__ import annotations

import os
from collections.abc import Mapping

from nucleate.errors import ConfigurationError

#: The kind of pages for new memory; see `docs/concepts/first-run.md`.
HUGE_PAGES = "NUCLEATE_HUGE_PAGES"
_HUGE_PAGES = {"measured": None, "always": True, "never": False}


def huge_pages(variables: Mapping[str, str] | None = None) -> bool | None:
    """Return True to always use huge pages for new memory, False to never use them, None to let measured times decide.

    Args:
        variables: Read these instead of `os.environ`.

    Raises:
        ConfigurationError: `NUCLEATE_HUGE_PAGES` has a value that is not allowed.
    """
    value = (os.environ if variables is None else variables).get(HUGE_PAGES, "measured")
    if value not in _HUGE_PAGES:
        allowed = ", ".join(map(repr, _HUGE_PAGES))
        raise ConfigurationError(f"the environment variable {HUGE_PAGES} is {value!r}; it may be {allowed}.")
    return _HUGE_PAGES[value]
