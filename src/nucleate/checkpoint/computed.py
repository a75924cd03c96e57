"""Tensors that rules make of a checkpoint's tensors: read in ranges like the tensors that lie in files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nucleate.checkpoint.files import Bytes
from nucleate.checkpoint.key_map import KeyMap, map_keys
from nucleate.checkpoint.renaming import Item, Renaming, empty_like, has_rules
from nucleate.checkpoint.stored import StoredTensor
from nucleate.deferred import ComputedGiven, deferred, give
from nucleate.deferred.pieces import Source


@dataclass(frozen=True, eq=False)
class ComputedTensor(StoredTensor):
    """A tensor that is made of stored ones by moving their elements. It has no chunks of its own.

    Attributes:
        computed: Reads it.
        made_of: The stored tensors.
    """

    computed: ComputedGiven
    made_of: tuple[StoredTensor, ...]

    @property
    def is_plain(self) -> bool:
        return False

    @property
    def identity(self) -> tuple[Any, ...]:
        return (self.dtype, self.shape, self.computed.describe())

    @property
    def files(self) -> tuple[Bytes, ...]:
        return tuple(file for stored in self.made_of for file in stored.files)

    @property
    def origin(self) -> str:
        return ", ".join(stored.key for stored in self.made_of)

    def check(self) -> None:
        for stored in self.made_of:
            stored.check()

    def order(self, start: int) -> tuple[int, int]:
        return self.computed.order(start)

    def describe(self) -> str:
        return self.computed.describe()

    def source(self) -> Source | None:
        return self.computed.source()

    def read(self, start: int, out: Tensor) -> None:
        self.computed.read(start, out)

    def read_box(self, begin: Any, out: Tensor) -> None:
        raise NotImplementedError("a computed tensor has no boxes in files")


def computed(tensors: dict[str, StoredTensor], key_map: KeyMap | None, where: str) -> dict[str, StoredTensor]:
    """Apply a key map to a checkpoint's tensors; nothing is read.

    Args:
        tensors: The tensors by name.
        key_map: Renames and rules.
        where: What messages call the checkpoint.

    Raises:
        CheckpointKeyError: A rule finds nothing, or not all that belongs together, or two tensors get one name.
        ShapeMismatchError: Tensors do not fit together, or sizes do not add up.
        ConfigurationError: It is no key map.
    """
    if not has_rules(key_map):
        return {new: tensors[old] for new, old in map_keys(tensors, key_map).items()}
    items = {name: Item(stored, (name,)) for name, stored in tensors.items()}
    renaming = Renaming(items, _stand_in, where)
    with deferred():
        renaming.apply(key_map)
        made: dict[int, StoredTensor] = {}
        found: dict[str, StoredTensor] = {}
        for name, item in renaming.items.items():
            if item.origin is not None:
                found[name] = item.origin
                continue
            if id(item) not in made:
                made[id(item)] = _computed(name, item, tensors)
            found[name] = made[id(item)]
    return found


def _computed(name: str, item: Item[StoredTensor], tensors: dict[str, StoredTensor]) -> StoredTensor:
    assert item.tensor is not None
    given = ComputedGiven(item.tensor)
    same = given.given()
    if isinstance(same, StoredTensor):
        # Moved and moved back.
        return same
    made_of = tuple(tensors[source] for source in item.sources)
    return ComputedTensor(name, given.dtype, given.shape, (), given, made_of)


def _stand_in(stored: StoredTensor) -> Tensor:
    tensor = empty_like(stored.shape, stored.dtype)
    give(tensor, stored)
    return tensor
