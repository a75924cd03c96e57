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
from dataclasses import dataclass

from nucleate.checkpoint.disk.address import LocalCopy, is_address
from nucleate.checkpoint.disk.save_mark import SaveMark
from nucleate.checkpoint.disk.series import resolve
from nucleate.checkpoint.readers.base import Reader
from nucleate.checkpoint.readers.opening import ReplacedError, open_checkpoint
from nucleate.checkpoint.stored.contents import Contents
from nucleate.checkpoint.stored.data_file import DataFile
from nucleate.cluster.ranks import Ranks
from nucleate.errors import CheckpointError

# A save takes longer than reading the headers of what it replaces, so a second attempt is nearly always enough.
_ATTEMPTS = 5


@dataclass(frozen=True)
class AgreedSave:
    """The save that ranks read together.

    Attributes:
        path: The path or address of rank 0, for messages.
        place: The path of the checkpoint on this machine.
        mark: The mark of the save; None in a single process, or if nothing can be read at the path.
        copy: The files that were copied to this machine, if `path` is an address.
    """

    path: str
    place: str
    mark: SaveMark | None
    copy: LocalCopy | None = None


def agree_on_save(path: str | os.PathLike[str], ranks: Ranks) -> AgreedSave:
    """Return the save at rank 0's path, for `open_saved`.

    Args:
        path: The path that the user gave; rank 0's path counts.
        ranks: The ranks that load together.

    Raises:
        CheckpointError: The path is an address whose files cannot be copied.
        ConfigurationError: No installed package reads such addresses.
        RankFailedError: One of these errors happened on another rank.
    """
    where = os.fspath(path) if is_address(path) else os.path.abspath(path)
    mark = None if is_address(where) or ranks.world_size == 1 or ranks.rank > 0 else _mark_at(where)
    where, mark = ranks.broadcast((where, mark))
    return _copied(where, ranks) if is_address(where) else AgreedSave(where, where, mark)


def _copied(address: str, ranks: Ranks) -> AgreedSave:
    """Copy the files at an address, once on each machine whose temporary files its ranks share."""
    copy = None
    machines = ranks.gather_objects(os.uname().nodename)
    with ranks.all_or_none(f"copying {address}"):
        if machines.index(machines[ranks.rank]) == ranks.rank:
            copy = LocalCopy(address)
    place = ranks.gather_objects(str(copy.path) if copy is not None else "")[machines.index(machines[ranks.rank])]
    with ranks.all_or_none(f"copying {address}"):
        if not os.path.exists(place):  # Two containers have the same name.
            copy = LocalCopy(address)
            place = str(copy.path)
    return AgreedSave(address, place, None, copy)


def open_saved(
    path: str | os.PathLike[str] | AgreedSave,
    reader: str | Reader | None = None,
    readers: Sequence[Reader] = (),
    trusted: bool = False,
    *,
    passes_over: bool = False,
) -> Contents:
    """Return the contents of the checkpoint that a user's path leads to; see `resolve` and [Note: One save].

    Args:
        path: A file or folder of any format, an address, or a pointer such as `runs/latest`; or the save that the ranks
            have agreed on.
        reader: See `open_checkpoint`.
        readers: See `open_checkpoint`.
        trusted: See `open_checkpoint`.
        passes_over: See `open_checkpoint`.

    Raises:
        CheckpointNotFoundError: Nothing exists at `path`.
        CheckpointError: No reader knows the file or folder, it is damaged, or another save has replaced it.
        ConfigurationError: No reader has this name, or no installed package reads such addresses.
    """
    copy, mark = None, None
    if isinstance(path, AgreedSave):
        copy, mark, path = path.copy, path.mark, path.place
    elif is_address(path):
        copy = LocalCopy(os.fspath(path))
        path = copy.path
    contents = _opened(path, reader, readers, trusted, mark, passes_over)
    if copy is not None:
        for tensor in contents.tensors.values():
            for file in tensor.files:
                if isinstance(file, DataFile):
                    file.keeps = copy
    return contents


def _opened(
    path: str | os.PathLike[str],
    reader: str | Reader | None,
    readers: Sequence[Reader],
    trusted: bool,
    mark: SaveMark | None,
    passes_over: bool,
) -> Contents:
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
