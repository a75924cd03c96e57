"""Reading mapped files ahead of whoever looks at them.

A page that is looked at and not in memory is read alone with its neighbours, and its reader waits. A disk gives several
times as much when it is asked for all that follows at once.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import suppress

from nucleate.checkpoint.stored.direct import available_bytes

# So much is asked for by one call, which waits while the disk has too much to do. Linux cuts a larger request down to
# what the disk takes at once, and forgets the rest: 128 KiB is what every disk takes.
_STEP_BYTES = 128 << 10
# Files that would fill more of the memory than this are left to the system, which would drop the first for the last.
_MEMORY_SHARE = 0.8


class ReadAhead:
    """Brings files into the page cache, one after the other, in a thread that ends with them."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, int]] = deque()
        self._size_bytes = 0
        self._is_running = False
        self._lock = threading.Lock()

    def start(self, descriptor: int, size_bytes: int) -> None:
        """Bring a file into the page cache behind those that were named before; return at once.

        Args:
            descriptor: Of the file, opened for reading. The caller may close it.
            size_bytes: How long it is.
        """
        available = available_bytes()
        self._size_bytes += size_bytes
        if available is None or self._size_bytes > _MEMORY_SHARE * available or not hasattr(os, "posix_fadvise"):
            return
        with suppress(OSError), self._lock:
            self._waiting.append((os.dup(descriptor), size_bytes))
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="nucleate-read-ahead", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_running = False
                    return
                descriptor, size_bytes = self._waiting.popleft()
            try:
                with suppress(OSError):
                    for offset in range(0, size_bytes, _STEP_BYTES):
                        os.posix_fadvise(descriptor, offset, _STEP_BYTES, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)
