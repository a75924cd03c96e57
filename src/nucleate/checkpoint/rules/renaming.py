"""Key maps and rules, applied one after the other: the names at the end, and the moves on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Generic, TypeVar

import torch
from torch import Tensor

from nucleate.checkpoint.rules.key_map import KeyMap, map_keys, steps_of
from nucleate.checkpoint.rules.rule import CountedMove, Move, Rule
from nucleate.errors import CheckpointKeyError, name_list

T = TypeVar("T")


@dataclass(slots=True)
class Item(Generic[T]):
    """A tensor on its way to another name.

    Attributes:
        origin: The original object; None if a move made the tensor.
        sources: The original names of all tensors that it is made from.
        tensor: The stand-in that records the moves.
    """

    origin: T | None
    sources: tuple[str, ...]
    tensor: Tensor | None = None


@dataclass(slots=True)
class Done(Generic[T]):
    """A completed move, kept so that it can be undone.

    Attributes:
        move: The move, with all its names.
        sources: The items that went in.
        results: The items that came out.
    """

    move: Move
    sources: list[Item[T]]
    results: list[Item[T]]


@dataclass(slots=True)
class Renaming(Generic[T]):
    """The items by name, to which key maps and rules are applied.

    Args:
        items: The items at the start.
        stand_in: Makes a deferred tensor for the origin of an item. It is called inside `deferred`, once per origin.
        where: The name of all items together in messages.
    """

    items: dict[str, Item[T]]
    stand_in: Callable[[T], Tensor]
    where: str
    done: list[Done[T]] = field(default_factory=list)
    _tensors: dict[int, Tensor] = field(default_factory=dict)

    def apply(self, key_map: KeyMap | None) -> None:
        """Apply all steps of a key map.

        Raises:
            CheckpointKeyError: A rule finds no tensors, or not all that belong together, or two results have one name.
            ShapeMismatchError: Tensors do not fit together, or sizes do not add up.
            ConfigurationError: `key_map` is not a key map.
        """
        waiting: list[Callable[[str], str | None]] = []
        for step in steps_of(key_map) if key_map is not None else ():
            if isinstance(step, Rule):
                self._rename(waiting)
                waiting = []
                self._apply(step)
            else:
                waiting.append(step)
        self._rename(waiting)

    def _rename(self, steps: list[Callable[[str], str | None]]) -> None:
        if steps:
            self.items = {new: self.items[old] for new, old in map_keys(self.items, steps).items()}

    def _apply(self, rule: Rule) -> None:
        moves = rule.moves(list(self.items))
        if not moves:
            if not rule.optional:
                raise CheckpointKeyError(self._found_nothing(rule))
            return
        # The items that replace the first source of each move.
        results: dict[str, dict[str, Item[T]]] = {}
        made_of: dict[str, str] = {}
        consumed: dict[str, str] = {}
        for move in moves:
            made = self._make(move)
            for source in move.sources:
                if source in consumed:
                    raise CheckpointKeyError(f"{rule}: {source} is part of {consumed[source]} and of {[*made]}.")
                consumed[source] = name_list(list(made)) or "the tensors that are left out"
            for name in made:
                if name in made_of:
                    raise CheckpointKeyError(f"{rule}: {made_of[name]} and {move.sources[0]} both become {name}.")
                made_of[name] = move.sources[0]
            results[move.sources[0]] = made
        items: dict[str, Item[T]] = {}
        for name, item in self.items.items():
            fresh = results.get(name, {} if name in consumed else {name: item})
            for key, value in fresh.items():
                if key in items or (key in self.items and key not in consumed and key != name):
                    raise CheckpointKeyError(f"{rule}: {name} becomes {key}, but there is a {key} already.")
                items[key] = value
        self.items = items

    def _make(self, move: Move) -> dict[str, Item[T]]:
        sources = [self.items[name] for name in move.sources]
        if move.forward is None:
            return dict.fromkeys(move.results, sources[0])
        tensors = move.forward([self.tensor(item) for item in sources])
        names = move.names(len(tensors)) if isinstance(move, CountedMove) else move.results
        origins = tuple(dict.fromkeys(name for item in sources for name in item.sources))
        made = [Item[T](None, origins, tensor) for tensor in tensors]
        self.done.append(Done(move, sources, made))
        found = dict(zip(names, made, strict=True))
        if len(found) != len(names):
            raise CheckpointKeyError(
                f"{move.sources[0]} would become two tensors of one name: {name_list(list(names))}."
            )
        return found

    def tensor(self, item: Item[T]) -> Tensor:
        """Return the stand-in of an item."""
        if item.tensor is None:
            assert item.origin is not None
            key = id(item.origin)
            if key not in self._tensors:
                self._tensors[key] = self.stand_in(item.origin)
            item.tensor = self._tensors[key]
        return item.tensor

    def _found_nothing(self, rule: Rule) -> str:
        patterns = [pattern.text for pattern in rule.patterns]
        close = get_close_matches(patterns[0], list(self.items), 3, 0.5)
        some = close or list(self.items)[:5]
        return (
            f"{rule} finds nothing in {self.where}. Its {len(self.items)} keys are like {name_list(some) or 'none'}. "
            "Pass optional=True if the tensors may be missing."
        )


def has_rules(key_map: KeyMap | None) -> bool:
    """Return whether a key map contains rules, and not only other names."""
    return key_map is not None and any(isinstance(step, Rule) for step in steps_of(key_map))


def empty_like(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a deferred tensor for the caller to bind to an element source; call this inside `deferred`."""
    return torch.empty(shape, dtype=dtype, device="cpu")
