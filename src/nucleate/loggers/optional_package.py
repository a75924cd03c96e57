"""The packages that loggers write with, which need not be installed."""

from __future__ import annotations

from importlib.util import find_spec

from nucleate.errors import MissingDependencyError


def require(package: str, logger: str) -> None:
    """Refuse a logger whose package is not installed, without importing the package.

    Args:
        package: The name of the package, which is also the name of our extra.
        logger: The name of the logger's class.

    Raises:
        MissingDependencyError: The package is not installed.
    """
    try:
        found = find_spec(package) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise MissingDependencyError(
            f"{logger} needs {package}, which is not installed. Install it with `pip install nucleate[{package}]`."
        )
