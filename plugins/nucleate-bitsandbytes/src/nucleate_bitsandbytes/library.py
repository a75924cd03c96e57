"""The import of bitsandbytes: it happens when a kernel is first needed, and suppresses one useless warning."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from types import ModuleType

from nucleate.errors import MissingDependencyError


@cache
def bitsandbytes() -> ModuleType:
    """Return bitsandbytes; the first call imports it, which takes a second or two.

    On CPUs with AVX512-BF16, bitsandbytes logs a warning if a package of kernels is not installed. bitsandbytes does
    not depend on that package. This function drops that one message during the import. Other messages, and the logger,
    stay as they are.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(_is_worth_it)
    try:
        return import_module("bitsandbytes")
    except ImportError as error:
        raise MissingDependencyError(
            f"nucleate-bitsandbytes needs the package bitsandbytes, which cannot be imported here: {error}. "
            "Install it: pip install bitsandbytes."
        ) from error
    finally:
        logger.removeFilter(_is_worth_it)


def _is_worth_it(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.msg
