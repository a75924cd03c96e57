"""The function `save`: it saves a state as one checkpoint, the same for every strategy and number of ranks.

This file decides the order of the steps on the ranks. `state` and `saving` decide which tensors and values a state
consists of. `disk` decides how the checkpoint becomes whole, and which old checkpoints are deleted. `writers` decide
the contents of the files.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from nucleate.checkpoint.disk.address import is_address, refuse_address
from nucleate.checkpoint.disk.series import Series, check_keep_last
from nucleate.checkpoint.rules.key_map import KeyMap
from nucleate.checkpoint.save_job import SaveJob
from nucleate.checkpoint.saving.handle import SaveHandle, settle
from nucleate.checkpoint.saving.snapshot import Snapshot, filters_for
from nucleate.checkpoint.state.entries import Kind, agree, entries_of
from nucleate.checkpoint.writers.base import Writer
from nucleate.checkpoint.writers.choosing import choose
from nucleate.cluster.save_group import SaveGroup
from nucleate.deferred import outside_inference_mode

if TYPE_CHECKING:
    from nucleate.cluster.communicator import Communicator

# Saves from several threads take turns: one save runs, or is waited for, at a time.
_turn = threading.RLock()


@outside_inference_mode()
def save(  # noqa: PLR0913 - one call takes every option of a save
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
    writers: Sequence[Writer] = (),
    one_file: bool = False,
) -> SaveHandle | None:
    """Save `state` at `path`, and replace a checkpoint that is there.

    Every rank calls this with the same state. A save is whole or absent: if a process is killed at any moment, the
    previous checkpoint stays. The ranks that hold a sharded tensor save it whole. Plain tensors and values are
    saved from rank 0. Tied parameters are saved once.

    Args:
        path: The checkpoint's path; rank 0's path counts. The endings `.safetensors`, `.pt`, `.pth`, `.bin` and
            `.ckpt` stand for one file of that format, any other name for a folder. Several nodes must share its file
            system.
        state: Modules, optimizers, objects with `state_dict` and `load_state_dict`, tensors and plain values, by
            name. Dicts may be nested. The state of an optimizer must also contain the module that has its parameters.
            Alternatively one module, whose keys then have no prefix.
        communicator: The ranks that save together.
        format: The format of a folder: `"dcp"` (the default), `"safetensors"`, which Hugging Face's libraries read, or
            the name of an installed writer. The ending of such a writer also stands for one file of its format.
        filter: For an entry's name, a function of key and value that returns whether to save them. `"a.b"` names a
            nested entry. If the state is one module, the function alone.
        max_shard_size: The largest size of the files of a safetensors folder: `"5GB"` or the like, or a number of
            bytes.
        asynchronous: Return as soon as this rank's part is copied to CPU memory, and write in the background.
        keep_last: How many of the checkpoints that were saved into the same folder with `keep_last` stay. The oldest
            are deleted; `"all"` deletes no checkpoint. The file `latest` beside them leads to the newest checkpoint.
        keys: Other names in the checkpoint, if the state is one module: a dict of regular expressions and
            replacements, a function, a rule such as `split` or `transpose`, or a list of these. Every rank also writes
            its own parts of the tensors that rules make.
        writers: Writers of further formats, the same on every rank. `format` takes their names.
        one_file: Refuse a path that stands for a folder, unless a format is given.

    Returns:
        A handle to wait for with `asynchronous`, else None.

    Raises:
        CheckpointKeyError: A rule finds no tensors, or not all that belong together, or two tensors get one name.
        ShapeMismatchError: Tensors that a rule joins do not fit together, or sizes do not add up.
        CheckpointError: Something other than a checkpoint is at `path`, a value cannot be saved, writing failed, or
            another job saves there. Also if an earlier asynchronous save failed and nobody waited for it.
        UsageError: A tensor is still deferred, or an optimizer's parameters are in no module of the state.
        ConfigurationError: The state is not a dict, has keys that are not strings, or options contradict each other.
        RankDisagreementError: The ranks' states differ.
        RankFailedError: One of these errors happened on another rank.
    """
    with _turn:
        unheard = settle()
        group, place = SaveGroup.of(communicator, os.fspath(path) if is_address(path) else os.path.abspath(path))
        saving = f"saving the checkpoint {place}"
        with group.all_or_none(saving):
            if unheard is not None:
                raise unheard
            refuse_address(place, "save")
            writer, target = choose(place, format, max_shard_size, writers, one_file)
            series = None if keep_last is None else Series.beside(target.path, check_keep_last(keep_last))
            entries = list(entries_of(state))
            snapshot = Snapshot(filters_for(filter, entries))
        options = {"format": writer.name, "max_shard_size": max_shard_size, "asynchronous": asynchronous}
        agree(entries, group, {**options, "keep_last": keep_last})
        for entry in sorted(entries, key=lambda entry: entry.kind is not Kind.MODULE):
            # Each entry has its own block: a state_dict may gather over the ranks, and must not wait for a failed rank.
            with group.all_or_none(f"{saving}: {entry.title}"):
                snapshot.add(entry)
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
