"""System calls that Python lacks, or has only for objects with a buffer. Without NumPy, a tensor has no buffer.

They run without the interpreter's lock, as all calls through ctypes do.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def system_call(name: str) -> Callable[[int, int, int, int], int]:
    """Return `pread` or `pwrite`, called with a descriptor, an address, a number of bytes and an offset.

    Args:
        name: `"pread"` or `"pwrite"`.
    """
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, f"{name}64", None) or getattr(library, name)
    function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64)
    function.restype = ctypes.c_ssize_t
    result: Callable[[int, int, int, int], int] = function
    return result


@functools.cache
def function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """Return a function of the C library.

    Args:
        name: The function's name.
        result: The ctypes type of its result.
        arguments: The ctypes types of its arguments.
    """
    found = getattr(ctypes.CDLL(None, use_errno=True), name)
    found.argtypes = arguments
    found.restype = result
    return found  # type: ignore[no-any-return]
