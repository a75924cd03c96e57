"""Conversion from any format to any other, without all tensors in memory at once.

The writer gets tensors without memory that know where their elements lie, and reads each tensor when it writes it. So
the target is whole or absent, as after every save. A cast needs no second copy on disk. Memory use does not depend on
the checkpoint's size: a few MiB for each thread, or one tensor if the format writes a tensor as a whole (DCP).
"""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nucleate.checkpoint.disk.address import is_address, refuse_address
from nucleate.checkpoint.disk.folder import stranded
from nucleate.checkpoint.disk.series import resolve
from nucleate.checkpoint.readers import open_saved, reader_for
from nucleate.checkpoint.rules.key_map import KeyMap
from nucleate.checkpoint.save_job import SaveJob
from nucleate.checkpoint.saving.rank_share import Box, SavedTensor
from nucleate.checkpoint.saving.snapshot import Snapshot
from nucleate.checkpoint.state.plain_forms import to_plain
from nucleate.checkpoint.state.tree import KeyPath, key_of, split
from nucleate.checkpoint.stored.contents import Contents
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.checkpoint.tools.selection import Selection, canonical
from nucleate.checkpoint.writers.choosing import choose, format_of
from nucleate.cluster.save_group import SaveGroup
from nucleate.errors import CheckpointError, ConfigurationError, name_list

# Dtypes whose values have a meaning by themselves. 8-bit values mean nothing without their scales: no cast for them.
_CASTABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_EVERYTHING = Selection()


@dataclass(frozen=True)
class ConvertReport:
    """The result of `convert`.

    Attributes:
        source: The checkpoint that was read.
        source_format: The name of the source's reader.
        target: The checkpoint that was written.
        format: The target's format.
        num_tensors: The number of written tensors; tied ones count once.
        size_bytes: The size of these tensors.
        num_cast: The number of these tensors that were cast.
        num_tied: The number of their further names.
        seconds: The duration.
        passed_over: The values of the source that are not plain data and that the selection does not contain. Nothing
            was made of them.
    """

    source: Path
    source_format: str
    target: Path
    format: str
    num_tensors: int
    size_bytes: int
    num_cast: int
    num_tied: int
    seconds: float
    passed_over: tuple[str, ...] = ()


def convert(  # noqa: PLR0913 - one call describes a whole conversion
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    selection: Selection = _EVERYTHING,
    reader: str | None = None,
    overwrite: bool = False,
    keys: KeyMap | None = None,
) -> ConvertReport:
    """Write a checkpoint again in another format, bit for bit.

    Every format also gets the values, and tied tensors stay tied. The target is whole or absent, even if the process
    is killed. Nothing may write to the source meanwhile.

    Args:
        source: A file or folder of any format.
        target: A name that ends in `.safetensors`, `.pt`, `.pth`, `.bin` or `.ckpt` stands for one file, any other
            name for a folder.
        format: The format of a folder: `"dcp"`, `"safetensors"` or the name of an installed writer. The default is the
            source's format if it is one of the first two, else `"safetensors"`.
        dtype: Cast the models' floating point tensors to this dtype.
        max_shard_size: The largest size of a file in a safetensors folder, such as `"5GB"` or a number of bytes.
        selection: The part of the source, and its names.
        reader: The source's format, if the files do not show it.
        overwrite: Replace the checkpoint that is at `target`.
        keys: Other names for the tensors of one model, and rules that join, split, transpose and permute tensors; the
            same as `Selection(keys=...)`.

    Raises:
        CheckpointNotFoundError: There is nothing at `source`.
        CheckpointKeyError: The selection is empty, or gives one name to two tensors; or a rule finds no tensor or an
            incomplete group of them.
        ShapeMismatchError: Tensors that a rule joins do not fit together, or sizes do not add up.
        CheckpointError: The source is damaged or changed meanwhile, the target's format cannot hold it, or writing
            failed.
        ConfigurationError: Something is at `target`, or arguments contradict each other.
    """
    begin = time.monotonic()
    if keys is not None:
        if selection.keys is not None:
            raise ConfigurationError("keys= is given twice: by itself, and in `selection`. Give it once.")
        selection = dataclasses.replace(selection, keys=keys)
    refuse_address(target, "convert")
    found = Path(source) if is_address(source) else resolve(source)
    place = Path(os.path.abspath(target))
    _check_dtype(dtype)
    _check_target(found, place, overwrite)
    whole = canonical(open_saved(source, reader, passes_over=True))
    contents = canonical(selection.of(whole))
    # With a prefix the selection consists of tensors alone.
    kept = [] if selection.prefix else list(contents.objects.values())
    passed_over = [f"{key_of(place)} ({one.name})" for place, one in whole.objects.items() if one not in kept]
    contents = dataclasses.replace(contents, objects={}) if selection.prefix else contents.made()
    if format is None and format_of(str(place)) is None:
        format = contents.format if contents.format in ("dcp", "safetensors") else "safetensors"
    writer, where = choose(str(place), format, max_shard_size)
    dtypes = _dtypes(contents, dtype)
    snapshot = _snapshot(contents, dtypes)
    writer.check(snapshot)
    job = SaveJob(snapshot, writer, where, None, SaveGroup(0, 1, None))
    job.prepare(copied=False)
    job.run()
    return ConvertReport(
        source=found,
        source_format=contents.format,
        target=place,
        format=writer.name,
        num_tensors=len(contents.tensors),
        size_bytes=snapshot.size_bytes,
        num_cast=sum(each is not contents.tensors[key].dtype for key, each in dtypes.items()),
        num_tied=len(contents.keys) - len(contents.tensors),
        passed_over=tuple(passed_over),
        seconds=time.monotonic() - begin,
    )


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in _CASTABLE:
        allowed = ", ".join(str(each) for each in _CASTABLE)
        raise ConfigurationError(f"dtype={dtype} is not a dtype that models can be cast to. Allowed are {allowed}.")


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    # A killed save may have left the last whole checkpoint under another name; see `CheckpointFolder`.
    is_stranded = not os.path.lexists(target) and target.name in stranded(target.parent)
    if not is_stranded and (not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir()))):
        return
    if not overwrite:
        raise ConfigurationError(
            f"{target} exists already. Give another path, or pass overwrite=True (--force) to replace a checkpoint."
        )
    if target.resolve() in source.resolve().parents:
        raise ConfigurationError(f"{source} lies in {target}, which the target would replace. Give another path.")
    if is_stranded:
        return
    try:
        reader_for(target)
    except CheckpointError as error:
        raise ConfigurationError(f"{target} is not a checkpoint, and only checkpoints are replaced. {error}") from error


def _dtypes(contents: Contents, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the new dtype of each tensor.

    Raises:
        ConfigurationError: The checkpoint does not say which tensors belong to a model and may be cast.
    """
    dtypes = {key: stored.dtype for key, stored in contents.tensors.items()}
    if dtype is None:
        return dtypes
    if not contents.modules:
        raise ConfigurationError(
            f"{contents.path} does not say which entries are models, and only models may be cast: an optimizer counts "
            f"steps in floating point. It has {name_list(map(str, contents.skeleton))}. Choose the model by `only`."
        )
    for place, key in contents.keys.items():
        if any(place[: len(module)] == module for module in contents.modules) and dtypes[key] in _CASTABLE:
            dtypes[key] = dtype
    return dtypes


def _snapshot(contents: Contents, dtypes: dict[str, torch.dtype]) -> Snapshot:
    """Return the snapshot of the contents, with tensors that are read only when they are written."""
    snapshot = Snapshot()
    # Objects of classes that the user allowed become plain forms; others are refused when the values are encoded.
    inside: dict[KeyPath, torch.Tensor] = {}
    snapshot.skeleton = split(to_plain(contents.skeleton, escapes=False), (), inside)
    if inside:
        names = name_list(map(key_of, inside))
        raise CheckpointError(f"{names} in {contents.path} are tensors in objects, which cannot be converted.")
    snapshot.keys = contents.keys
    snapshot.modules = list(contents.modules)
    snapshot.is_complete = contents.is_complete
    snapshot.tensors = [_held(contents, stored, dtypes[stored.key]) for stored in contents.tensors.values()]
    snapshot.values = snapshot.layout.encode()
    return snapshot


def _held(contents: Contents, stored: StoredTensor, dtype: torch.dtype) -> SavedTensor:
    dims = contents.sharded.get(stored.key)
    whole = Box((0,) * len(stored.shape), torch.empty(stored.shape, dtype=dtype, device="meta"), stored)
    return SavedTensor(stored.key, dtype, stored.shape, None if dims is None else tuple(dims), (whole,))
