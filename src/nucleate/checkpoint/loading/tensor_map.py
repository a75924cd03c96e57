"""Key maps on a checkpoint's tensors: the tensors under new names, and those that rules compute. Nothing is read."""

from __future__ import annotations

from torch import Tensor

from nucleate.checkpoint.rules.key_map import KeyMap, map_keys
from nucleate.checkpoint.rules.renaming import Item, Renaming, empty_like, has_rules
from nucleate.checkpoint.stored.computed_tensor import ComputedTensor
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.deferred import ComputedSource, bind, deferred


def map_tensors(tensors: dict[str, StoredTensor], key_map: KeyMap | None, where: str) -> dict[str, StoredTensor]:
    """Apply a key map to a checkpoint's tensors.

    Args:
        tensors: The tensors by name.
        key_map: Renames and rules.
        where: The checkpoint's name in messages.

    Raises:
        CheckpointKeyError: A rule finds no tensor or an incomplete group of them, or two tensors get one name.
        ShapeMismatchError: Tensors do not fit together, or sizes do not add up.
        ConfigurationError: `key_map` is not a key map.
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
    given = ComputedSource(item.tensor)
    same = given.given()
    if isinstance(same, StoredTensor):
        # The rules moved the elements, and moved them back.
        return same
    return ComputedTensor.of(name, given, tuple(tensors[source] for source in item.sources))


def _stand_in(stored: StoredTensor) -> Tensor:
    tensor = empty_like(stored.shape, stored.dtype)
    if stored.numel:
        bind(tensor, stored)
    return tensor
