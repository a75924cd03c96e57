"""Read-ahead of mapped files, before anybody accesses their pages.

An access to a page that is not in memory reads only this page and its neighbours, and the accessing thread waits. A
disk delivers several times as much if one request asks for all pages that follow.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import suppress

from nucleate.checkpoint.stored.direct import available_bytes

# The bytes that one call asks for. The call waits while the disk has too much to do. Linux cuts a larger request down
# to the size that the disk takes at once, and forgets the rest. Every disk takes 128 KiB.
_STEP_BYTES = 128 << 10
# Files that would fill more than this part of the memory are left to the system: it would drop the first files for the
# last ones.
_MEMORY_SHARE = 0.8


class ReadAhead:
    """A queue of files to bring into the page cache, one after the other, in a thread that ends with the queue."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, int]] = deque()
        self._size_bytes = 0
        self._is_running = False
        self._lock = threading.Lock()

    def start(self, descriptor: int, size_bytes: int) -> None:
        """Add a file to the queue, and return at once.

        Args:
            descriptor: The descriptor of the file, opened for reading. The caller may close it.
            size_bytes: The length of the file.
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
