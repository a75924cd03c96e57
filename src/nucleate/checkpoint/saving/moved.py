"""Key maps of a save: rules join, split and transpose the saved tensors, and each rank writes its part.

The rules are undone on stand-ins of the written tensors. So every tensor of the model knows where in the files its
elements belong, and a rank writes its part there, range by range. Nothing is gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nucleate.checkpoint.rules.key_map import KeyMap, map_keys
from nucleate.checkpoint.rules.renaming import Item, Renaming, empty_like, has_rules
from nucleate.checkpoint.saving.rank_share import Box, SavedTensor
from nucleate.deferred import ComputedSource, ElementSource, bind, deferred
from nucleate.deferred.replay import TensorView, boxes, scatter
from nucleate.errors import CheckpointError
from nucleate.layout import runs

# The most boxes of one tensor that DCP gets, and the most bytes that are copied for them first.
_MAX_BOXES = 1 << 8
_MAX_COPIED_BYTES = 4 << 20


@dataclass(eq=False, slots=True)
class MovedBox:
    """A box of a tensor of the model whose elements go to other places.

    Attributes:
        key: The tensor's name in the model.
        shape: The tensor's shape.
        begin: The box's first index.
        values: The box's values, on any device and with any strides.
        source: The places of the elements: a view into tensors that are written.
    """

    key: str
    shape: tuple[int, ...]
    begin: tuple[int, ...]
    values: Tensor
    source: TensorView

    def scatter(self, offset: int, values: Tensor, write: Callable[[str, int, Tensor], None]) -> None:
        """Pass elements to `write`, with the key that they belong to and their place there.

        Args:
            offset: The first element, counted in the whole tensor.
            values: A range of elements, one-dimensional and contiguous.
            write: Called with key, first element and values.
        """

        def to_key(given: ElementSource, start: int, part: Tensor) -> None:
            assert isinstance(given, _Written)
            if given.key is not None:
                write(given.key, start, part)

        scatter(self.source, offset, values, to_key)


@dataclass(slots=True)
class Moved:
    """The outcome of a key map for the saved tensors.

    Attributes:
        tensors: The written tensors, with this rank's boxes except those in `boxes`.
        names: The name of every tensor, tied ones included, to its key.
        boxes: This rank's boxes of tensors whose elements are moved.
        whole: The element sources of the written tensors whose elements rank 0 has completely, by key.
    """

    tensors: list[SavedTensor]
    names: dict[str, str]
    boxes: list[MovedBox]
    whole: dict[str, ElementSource]


class _Written(ElementSource):
    """A stand-in for a written tensor; its key is None if the tensor is left out."""

    def __init__(self, key: str | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.key, self.shape, self.dtype = key, shape, dtype

    def read(self, start: int, out: Tensor) -> None:
        raise NotImplementedError("it is only written")

    def order(self, start: int) -> tuple[int, int]:
        return (0, start)

    def describe(self) -> str:
        return f"written {self.key}"


class _Held(ElementSource):
    """The elements of a tensor of the model; this rank has them all."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        #: The box with the values, or with their copy while training continues.
        self.box: MovedBox | None = None

    def read(self, start: int, out: Tensor) -> None:
        assert self.box is not None
        values, done = self.box.values.detach(), 0
        for begin, lengths in boxes(self.shape, start, start + out.numel()):
            part = values[tuple(slice(b, b + n) for b, n in zip(begin, lengths, strict=True))]
            numel = math.prod(lengths)
            out[done : done + numel].view(lengths).copy_(part)
            done += numel

    def order(self, start: int) -> tuple[int, int]:
        return (0, start)

    def describe(self) -> str:
        return f"held {self.shape} {self.dtype}"


@dataclass(eq=False, slots=True)
class _Origin:
    """A name of the model, and its tensor."""

    name: str
    held: SavedTensor
    given: _Held


def moved(tensors: list[SavedTensor], names: Mapping[str, str], key_map: KeyMap, rank: int) -> Moved:
    """Apply a key map to the saved tensors.

    Args:
        tensors: The saved tensors, with this rank's boxes.
        names: Every name in the model, tied ones included, to the key of its tensor.
        key_map: Renames and rules, from names in the model to names in the file.
        rank: The number of this process.

    Raises:
        CheckpointKeyError: A rule finds no tensor or an incomplete group of them, or two tensors get one name.
        ShapeMismatchError: Tensors do not fit together, or sizes do not add up.
        ConfigurationError: `key_map` is not a key map.
    """
    held = {one.key: one for one in tensors}
    if not has_rules(key_map):
        return _renamed({new: held[names[old]] for new, old in map_keys(names, key_map).items()})
    items = {
        name: Item(_Origin(name, held[key], _Held(held[key].shape, held[key].dtype)), (name,))
        for name, key in names.items()
    }
    renaming = Renaming(items, _stand_in, "the model")
    with deferred():
        renaming.apply(key_map)
        plain = {name: item.origin.held for name, item in renaming.items.items() if item.origin is not None}
        made = {name: item for name, item in renaming.items.items() if item.origin is None}
        result = _renamed(plain)
        first: dict[int, str] = {}
        for name, item in made.items():
            assert item.tensor is not None
            result.names[name] = key = first.setdefault(id(item.tensor), name)
            if key == name:
                sharded = any(held[names[source]].sharded is not None for source in item.sources)
                dims = () if sharded else None
                result.tensors.append(SavedTensor(name, item.tensor.dtype, tuple(item.tensor.shape), dims, ()))
                if not sharded and rank == 0:
                    result.whole[name] = ComputedSource(item.tensor)
        # In the order of the model.
        places = {name: place for place, name in enumerate(renaming.items)}
        result.tensors.sort(key=lambda one: places[one.key])
        result.names = {name: result.names[name] for name in places}
        result.boxes.extend(_boxes(renaming, {id(made[name]): name for name in first.values()}))
    return result


def _renamed(found: Mapping[str, SavedTensor]) -> Moved:
    first: dict[str, str] = {}
    keys = {name: first.setdefault(one.key, name) for name, one in found.items()}
    return Moved([replace(found[name], key=name) for name in first.values()], keys, [], {})


def _boxes(renaming: Renaming[_Origin], results: Mapping[int, str]) -> list[MovedBox]:
    """Undo the rules on stand-ins of the written tensors, and return this rank's boxes with their places there."""
    back: dict[int, Tensor] = {}
    for done in reversed(renaming.done):
        tensors = []
        for item in done.results:
            assert item.tensor is not None
            if id(item) not in back:
                written = _Written(results.get(id(item)), tuple(item.tensor.shape), item.tensor.dtype)
                back[id(item)] = tensor = empty_like(written.shape, written.dtype)
                bind(tensor, written)
            tensors.append(back[id(item)])
        shapes = [tuple(renaming.tensor(item).shape) for item in done.sources]
        for item, tensor in zip(done.sources, done.move.backward(tensors, shapes), strict=True):
            back[id(item)] = tensor
    boxes: list[MovedBox] = []
    for origin, tensor in [
        (item.origin, back[id(item)]) for done in renaming.done for item in done.sources if item.origin is not None
    ]:
        for box in origin.held.boxes:
            if not box.values.numel():
                continue
            source = ComputedSource(tensor).source()
            assert source is not None, "rules only move elements"
            one = MovedBox(origin.name, origin.held.shape, box.begin, box.values, source)
            origin.given.box = one
            boxes.append(one)
    return boxes


def _stand_in(origin: _Origin) -> Tensor:
    tensor = empty_like(origin.held.shape, origin.held.dtype)
    bind(tensor, origin.given)
    return tensor


def as_boxes(
    tensors: list[SavedTensor], moved_boxes: list[MovedBox], whole: Mapping[str, ElementSource]
) -> list[SavedTensor]:
    """Return the written tensors as boxes, for a format that holds boxes.

    Args:
        tensors: The written tensors, without the moved boxes.
        moved_boxes: The moved boxes.
        whole: The element sources of tensors whose elements this rank has completely.

    Raises:
        CheckpointError: A moved box would become many small boxes.
    """
    found: dict[str, list[Box]] = {
        name: [Box((0,) * len(given.shape), torch.empty(given.shape, dtype=given.dtype, device="meta"), given)]
        for name, given in whole.items()
    }
    shapes = {held.key: held.shape for held in tensors}
    for box in moved_boxes:
        _add_boxes(found, box, shapes, whole)
    return [replace(held, boxes=tuple(found[held.key])) if held.key in found else held for held in tensors]


def _add_boxes(
    found: dict[str, list[Box]],
    box: MovedBox,
    shapes: Mapping[str, tuple[int, ...]],
    whole: Mapping[str, ElementSource],
) -> None:
    memory = box.values.untyped_storage()._cdata
    count = copied_bytes = 0

    def add(key: str, start: int, part: Tensor) -> None:
        nonlocal count, copied_bytes
        done = 0
        if part.untyped_storage()._cdata != memory:
            copied_bytes += part.numel() * part.element_size()
        for begin, lengths in () if key in whole else boxes(shapes[key], start, start + part.numel()):
            count += 1
            if count > _MAX_BOXES or copied_bytes > _MAX_COPIED_BYTES:
                raise CheckpointError(
                    f"a DCP folder holds boxes of tensors, and this rank's part of {box.key} becomes many small ones "
                    f'in {key}. Save with format="safetensors", or to one file.'
                )
            numel = math.prod(lengths)
            found.setdefault(key, []).append(Box(begin, part[done : done + numel].view(lengths)))
            done += numel

    for offset, part in runs_of(box):
        box.scatter(offset, part, add)


def runs_of(box: MovedBox) -> list[tuple[int, Tensor]]:
    """Return the ranges of the whole tensor that a box consists of: first element and values."""
    flat, done = box.values.detach().reshape(-1), 0
    found = []
    for offset, numel in runs(box.begin, tuple(box.values.shape), box.shape) if flat.numel() else ():
        found.append((offset, flat[done : done + numel]))
        done += numel
    return found
