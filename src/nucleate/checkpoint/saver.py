"""Saves a state as one checkpoint, the same for every strategy and number of ranks.

This file decides the order in which things happen on the ranks. What a state consists of is decided in `state` and
`saving`, how the checkpoint becomes whole and which old ones go in `disk`, and what its files hold in `writers`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from nucleate.checkpoint.disk.series import Series, check_keep_last
from nucleate.checkpoint.rules.key_map import KeyMap
from nucleate.checkpoint.save_job import SaveJob
from nucleate.checkpoint.saving.handle import SaveHandle, settle
from nucleate.checkpoint.saving.snapshot import Snapshot, filters_for
from nucleate.checkpoint.state.entries import Kind, agree, entries_of
from nucleate.checkpoint.writers.choosing import choose
from nucleate.cluster.save_group import SaveGroup

if TYPE_CHECKING:
    from nucleate.cluster.communicator import Communicator

# Saves from several threads take turns: there is one under way, or waited for, at a time.
_turn = threading.RLock()


def save(  # noqa: PLR0913 - one call says all there is to say of a save
    path: str | os.PathLike[str],
    state: dict[str, Any] | nn.Module,
    communicator: Communicator,
    *,
    format: str | None = None,
    filter: Mapping[str, Callable[[str, Any], bool]] | Callable[[str, Any], bool] | None = None,
    max_shard_size: int | str = "5GB",
    asynchronous: bool = False,
    keep_last: int | str | None = None,
    keys: KeyMap | None = None,
) -> SaveHandle | None:
    """Save `state` at `path`, replacing the checkpoint that is there.

    Every rank calls this with the same state. A save is whole or absent: a process that is killed at any moment
    leaves the previous checkpoint. Sharded tensors are saved whole, by the ranks that hold them; of plain tensors
    and values rank 0's count. Tied parameters are saved once.

    Args:
        path: Where; rank 0's counts. An ending `.safetensors`, `.pt`, `.pth`, `.bin` or `.ckpt` stands for one file of
            that format, any other name for a folder. On several nodes it must be on a file system that all share.
        state: Modules, optimizers, objects with `state_dict` and `load_state_dict`, tensors and plain values, by
            name; dicts may be nested. An optimizer needs the module that has its parameters in the same state. Or one
            module by itself, whose keys then have no prefix.
        communicator: The ranks that save together.
        format: Of a folder: `"dcp"` (the default) or `"safetensors"`, which Hugging Face's libraries read; or the name
            of an installed writer. The ending of such a writer stands for one file of its format as well.
        filter: Entry to a function of key and value that says what of it is saved; `"a.b"` names a nested entry.
            The function alone where the state is one module.
        max_shard_size: How large the files of a safetensors folder may be, such as `"5GB"` or a number of bytes.
        asynchronous: Return as soon as this rank's part is copied to CPU memory, and write in the background.
        keep_last: Keep that many of the checkpoints that were saved next to each other with `keep_last`, and delete
            the oldest; `"all"` deletes none. The file `latest` beside them leads to the newest one.
        keys: Other names in the checkpoint, where the state is one module: a dict of regular expressions and
            replacements, a function, a rule such as `split` or `transpose`, or a list of these. Every rank writes its
            own parts of what rules make, too.

    Returns:
        With `asynchronous`, a handle to wait for; else None.

    Raises:
        CheckpointKeyError: A rule finds nothing, or not all that belongs together, or two tensors get one name.
        ShapeMismatchError: Tensors that a rule joins do not fit together, or sizes do not add up.
        CheckpointError: Something is in the way at `path`, a value cannot be saved, writing failed, or another job
            saves there; also when an asynchronous save before this one failed and nobody waited for it.
        UsageError: A tensor is still deferred, or an optimizer's parameters are in no module of the state.
        ConfigurationError: The state is not a dict or has keys that are not strings, or options contradict each other.
        RankDisagreementError: The ranks' states differ.
        RankFailedError: One of these happened on another rank.
    """
    with _turn:
        unheard = settle()
        group, place = SaveGroup.of(communicator, os.path.abspath(path))
        saving = f"saving the checkpoint {place}"
        with group.all_or_none(saving):
            if unheard is not None:
                raise unheard
            writer, target = choose(place, format, max_shard_size)
            series = None if keep_last is None else Series.beside(target.path, check_keep_last(keep_last))
            entries = list(entries_of(state))
            snapshot = Snapshot(filters_for(filter, entries))
        options = {"format": writer.name, "max_shard_size": max_shard_size, "asynchronous": asynchronous}
        agree(entries, group, {**options, "keep_last": keep_last})
        for entry in sorted(entries, key=lambda entry: entry.kind is not Kind.MODULE):
            # One block for each: a state_dict may gather over the ranks, and must not wait for a rank that failed.
            with group.all_or_none(f"{saving}: {entry.title}"):
                snapshot.take(entry)
        with group.all_or_none(saving):
            snapshot.close(group.rank, keys)
            writer.check(snapshot)
        snapshot.agree(group)
        job = SaveJob(snapshot, writer, target, series, group)
        job.prepare(copied=asynchronous)
        if not asynchronous:
            job.run()
            return None
        try:
            return SaveHandle(target.path, job.run)
        except BaseException:
            job.clean_up()
            raise
