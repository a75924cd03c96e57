"""Agreement of the ranks on what they save: the same keys, shapes, dtypes and plain values.

A checkpoint holds one value for each name. A tensor that is sharded has parts on several ranks, and the layout says
which. Of anything else, rank 0's copy is saved, so the ranks must have the same. The elements of plain tensors are not
compared: the running statistics of a batch norm may differ, and rank 0's are saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nucleate.checkpoint.saving.rank_share import SavedTensor
from nucleate.checkpoint.state.tree import KeyPath, key_of
from nucleate.cluster.save_group import SaveGroup
from nucleate.errors import RankDisagreementError

_PLAIN = frozenset({type(None), bool, int, float, complex, str})
# Longer texts of values are cut in messages.
_SHOWN = 100
# The number of differences that a message shows.
_MOST = 10
_NOTHING = "absent"


def agree_on_contents(tensors: list[SavedTensor], keys: Mapping[KeyPath, str], skeleton: Any, group: SaveGroup) -> None:
    """Make sure that every rank saves the same. One hash for each rank is exchanged, and details only for an error.

    Args:
        tensors: The tensors with this rank's boxes.
        keys: The place of each tensor to its key.
        skeleton: The state without its tensors.
        group: The ranks.

    Raises:
        RankDisagreementError: The ranks differ; the message names what differs, with the values of two ranks.
    """
    if group.world_size == 1:
        return
    # The ranks share the writing of sharded tensors by their order.
    order = [held.key for held in tensors if held.sharded is not None]
    lines = sorted(f"{path!r} {text}" for path, text in _described(tensors, keys, skeleton, whole=False))
    if len(set(group.gather_objects(_hash_of([*order, *lines])))) == 1:
        return
    mine = {key_of(path): text for path, text in _described(tensors, keys, skeleton, whole=True)}
    first, first_order = group.broadcast((mine, order))
    found = [
        (name, first.get(name, _NOTHING), mine.get(name, _NOTHING))
        for name in (*first, *(name for name in mine if name not in first))
        if first.get(name, _NOTHING) != mine.get(name, _NOTHING)
    ]
    everyone = group.gather_objects((found[:_MOST], len(found), order))
    rank, (some, number, other) = next(
        (rank, said) for rank, said in enumerate(everyone) if said[1] or said[2] != first_order
    )
    if not some:
        here, there = next(pair for pair in zip(first_order, other, strict=True) if pair[0] != pair[1])
        raise RankDisagreementError(
            f"the ranks' sharded tensors have another order: rank 0 has {here} where rank {rank} has {there}. Every "
            "rank must save the same state, in the same order."
        )
    shown = [f"{name} is {_cut(here)} on rank 0 but {_cut(there)} on rank {rank}" for name, here, there in some]
    more = f"; and {number - len(some)} more" if number > len(some) else ""
    raise RankDisagreementError(
        f"the ranks' states differ, and a checkpoint would hold rank 0's alone: {'; '.join(shown)}{more}. Nothing was "
        "saved. Every rank must save the same keys, shapes, dtypes and values. To keep the values of all ranks, save "
        "runtime.all_gather(value) on every rank; to keep rank 0's, save runtime.broadcast(value); or leave the entry "
        "out."
    )


def _described(
    tensors: list[SavedTensor], keys: Mapping[KeyPath, str], skeleton: Any, whole: bool
) -> Iterator[tuple[KeyPath, str]]:
    """Yield the place of each tensor and value, with a text that is equal on ranks that have the same.

    Args:
        tensors: The tensors with this rank's boxes.
        keys: The place of each tensor to its key.
        skeleton: The state without its tensors.
        whole: Yield each number of a long list by itself. Otherwise lists of numbers are one item, which is faster.
    """
    looks = {held.key: _look(held) for held in tensors}
    for path, key in keys.items():
        yield path, looks.get(key, _NOTHING) if key_of(path) == key else f"tied to {key}"
    yield from _values(skeleton, (), keys, whole)


def _look(held: SavedTensor) -> str:
    dtype = str(held.dtype).removeprefix("torch.")
    return f"{dtype} {held.shape}" + ("" if held.sharded is None else ", sharded")


def _values(node: Any, path: KeyPath, keys: Mapping[KeyPath, str], whole: bool) -> Iterator[tuple[KeyPath, str]]:
    if path in keys:
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, Mapping):
        items = node.items()
    elif type(node) in (list, tuple):
        if not whole and _PLAIN.issuperset(map(type, node)) and None not in node:
            yield path, _plain(node)
            return
        items = enumerate(node)
    if not items or not node:
        yield path, _text(node)
    for name, item in items:
        yield from _values(item, (*path, name), keys, whole)


def _text(value: Any) -> str:
    """Return a text that is equal for equal values of all ranks."""
    kind = type(value)
    if kind in _PLAIN:
        return _plain(value)
    if kind in (bytes, bytearray):
        return f"{len(value)} bytes with the hash {hashlib.blake2b(value, digest_size=8).hexdigest()}"
    if kind in (set, frozenset) and _PLAIN.issuperset(map(type, value)):
        # The order of a set of strings is different in each process.
        return f"{kind.__name__} of {sorted(map(repr, value))}"
    if kind.__module__ == "numpy" and callable(getattr(value, "item", None)) and not getattr(value, "shape", ()):
        return f"{kind.__name__} {value.item()!r}"
    # Other objects may have no text that is equal in each process.
    return f"a {kind.__qualname__}"


def _plain(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # an integer of thousands of digits
        return hex(value) if type(value) is int else ", ".join(map(_plain, value))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _hash_of(lines: list[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
