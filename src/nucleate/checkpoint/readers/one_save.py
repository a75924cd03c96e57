"""The reading of one save, while other processes may save to the same place.

[Note: One save]
A load reads files of one save only. The readers open a folder once, and each file relative to the open folder, so that
a save cannot replace files between two reads. `open_checkpoint` compares the mark of the save (`SaveMark`) before and
after the headers are read. If another save has taken the name meanwhile, `open_saved` begins again, because nothing has
changed so far. Ranks that load together compare their marks with rank 0's. The files that hold tensors stay open, so
that a later save cannot replace them. A program that writes into these files is noticed by their times.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from nucleate.checkpoint.disk.save_mark import SaveMark
from nucleate.checkpoint.disk.series import resolve
from nucleate.checkpoint.readers.base import Reader
from nucleate.checkpoint.readers.opening import ReplacedError, open_checkpoint
from nucleate.checkpoint.stored.contents import Contents
from nucleate.cluster.ranks import Ranks
from nucleate.errors import CheckpointError

# A save takes longer than reading the headers of what it replaces, so a second attempt is nearly always enough.
_ATTEMPTS = 5


def agree_on_save(path: str | os.PathLike[str], ranks: Ranks) -> tuple[str, SaveMark | None]:
    """Return rank 0's path and the mark of the save there, for `open_saved`.

    The mark is None in a single process, or if nothing can be read at the path.

    Args:
        path: The path that the user gave; rank 0's path counts.
        ranks: The ranks that load together.
    """
    where = os.path.abspath(path)
    mark = _mark_at(where) if ranks.world_size > 1 and ranks.rank == 0 else None
    return ranks.broadcast((where, mark))


def open_saved(
    path: str | os.PathLike[str],
    reader: str | Reader | None = None,
    readers: Sequence[Reader] = (),
    trusted: bool = False,
    mark: SaveMark | None = None,
    *,
    passes_over: bool = False,
) -> Contents:
    """Return the contents of the checkpoint that a user's path leads to; see `resolve` and [Note: One save].

    Args:
        path: A file or folder of any format, or a pointer such as `runs/latest`.
        reader: See `open_checkpoint`.
        readers: See `open_checkpoint`.
        trusted: See `open_checkpoint`.
        mark: The mark of the save to read. By default, any save is read.
        passes_over: See `open_checkpoint`.

    Raises:
        CheckpointNotFoundError: Nothing exists at `path`.
        CheckpointError: No reader knows the file or folder, it is damaged, or another save has replaced it.
        ConfigurationError: No reader has this name.
    """
    for attempt in range(_ATTEMPTS):
        place = resolve(path)
        found = SaveMark.of(place)
        if mark is not None and (found is None or found.is_other(mark)):
            raise ReplacedError(place)
        try:
            return open_checkpoint(place, reader, readers, trusted, passes_over=passes_over)
        except CheckpointError as error:
            lasts = not isinstance(error, ReplacedError) and found is not None and SaveMark.of(place) == found
            if lasts or mark is not None or attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("the last attempt returns or raises")


def _mark_at(path: str) -> SaveMark | None:
    try:
        return SaveMark.of(resolve(path))
    except (CheckpointError, OSError, ValueError):
        return None
