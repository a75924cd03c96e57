"""bitsandbytes itself: imported when its kernels are first needed, and without a warning that helps nobody."""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from types import ModuleType

from nucleate.errors import MissingDependencyError


@cache
def bitsandbytes() -> ModuleType:
    """Import and return bitsandbytes, which takes a second or two, the first time.

    On CPUs with AVX512-BF16 it logs a warning if a package of kernels, which it does not depend on, is not installed.
    That one message is dropped, that once; other messages, and the logger, stay as they are.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(_is_worth_it)
    try:
        return import_module("bitsandbytes")
    except ImportError as error:
        raise MissingDependencyError(
            f"nucleate-bitsandbytes computes with the package bitsandbytes, which cannot be imported here: {error}. "
            "Install it: pip install bitsandbytes."
        ) from error
    finally:
        logger.removeFilter(_is_worth_it)


def _is_worth_it(record: logging.LogRecord) -> bool:
    return "kernels-community" not in record.msg
