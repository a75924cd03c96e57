"""The watch over ranks that wait for each other: nobody waits for a rank that will not come.

Each process counts its calls (`calls.py`) and has one thread (`watcher.py`), which sleeps until a call takes longer
than a second. Then rank 0's thread asks all ranks where they are (`hub.py`). If a rank waits in vain for certain
(`verdict.py`), every thread closes the connections of its own process, which wakes the ranks that wait for it.
"""

from nucleate.cluster.watch.calls import CALLS
from nucleate.cluster.watch.session import begin, end, is_on

__all__ = ["CALLS", "begin", "end", "is_on"]
