"""Settings in environment variables: those of a machine begin with `NUCLEATE_`; the seed has the names of Lightning.

A seed in the environment reaches the processes that this process starts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from nucleate.errors import ConfigurationError

#: The kind of pages for new memory; see `docs/concepts/first-run.md`.
HUGE_PAGES = "NUCLEATE_HUGE_PAGES"
_HUGE_PAGES = {"measured": None, "always": True, "never": False}

#: The seed of `seed_everything`, and whether it seeds the workers of data loaders. Lightning reads and writes them too.
GLOBAL_SEED = "PL_GLOBAL_SEED"
SEED_WORKERS = "PL_SEED_WORKERS"


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


def global_seed(variables: Mapping[str, str] | None = None) -> int | None:
    """Return the seed that this process got by `PL_GLOBAL_SEED`, or None if the variable is not set.

    Args:
        variables: Read these instead of `os.environ`.

    Raises:
        ConfigurationError: The variable is not an integer.
    """
    value = (os.environ if variables is None else variables).get(GLOBAL_SEED)
    if value is None:
        return None
    try:
        return int(value)
    except ValueError:
        raise ConfigurationError(
            f"the environment variable {GLOBAL_SEED} is {value!r}, which is not an integer. Set it to the seed, or "
            "unset it."
        ) from None


def hand_down_seed(seed: int, workers: bool) -> None:
    """Write the seed into the environment, for the processes that this process starts.

    Args:
        seed: The seed.
        workers: Whether it seeds the workers of data loaders.
    """
    os.environ[GLOBAL_SEED] = str(seed)
    os.environ[SEED_WORKERS] = str(int(workers))
