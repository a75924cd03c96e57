"""Keys of a checkpoint that was saved from a shell, such as the module of `torch.compile`, without the shell's part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from itertools import combinations
from typing import TypeVar

from torch import nn

from nucleate.shells import attributes, state_dict

T = TypeVar("T")

# More parts of one name are not looked at: a file may have names that were made to take long.
_MOST = 8


def plain_keys(stored: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """Return the names that stored names had before shells put their attributes into them.

    A part of a name, such as `_orig_mod`, counts as a shell's if a wanted name is found without it. The part then goes
    from all names that have it in the same place. A name stays if another stored name would get the same name.

    Args:
        stored: The names in a checkpoint.
        wanted: The plain names that a model asks for.

    Returns:
        The new name of each stored name that changes.

    >>> plain_keys(["_orig_mod.0.weight", "_orig_mod.1.old"], {"0.weight", "1.new"})
    {'_orig_mod.0.weight': '0.weight', '_orig_mod.1.old': '1.old'}
    """
    known = attributes()
    # What the model asks for is never renamed.
    strange = [tuple(name.split(".")) for name in stored if name not in wanted]
    shells: set[tuple[str, ...]] = set()
    for parts in strange:
        places = [place for place, part in enumerate(parts) if part in known][:_MOST]
        shells.update(parts[: place + 1] for place in _shells_in(parts, places, wanted))
    if not shells:
        return {}
    plain = {
        ".".join(parts): ".".join(part for place, part in enumerate(parts) if parts[: place + 1] not in shells)
        for parts in strange
    }
    counts = Counter([*plain.values(), *(name for name in stored if name in wanted)])
    return {name: new for name, new in plain.items() if new != name and counts[new] == 1}


def _shells_in(parts: tuple[str, ...], places: list[int], wanted: Collection[str]) -> tuple[int, ...]:
    """Return those of some places of a name that lead to a wanted name when they are left out: as few as possible."""
    for count in range(1, len(places) + 1):
        for left_out in combinations(places, count):
            if ".".join(part for place, part in enumerate(parts) if place not in left_out) in wanted:
                return left_out
    return ()


def plain_stored(stored: Mapping[str, T], module: nn.Module) -> dict[str, T]:
    """Return stored things under the names that `plain_keys` gives them, in the same order.

    Args:
        stored: Things by the names in a checkpoint.
        module: The module that asks for them.
    """
    known = attributes()
    if not any(part in known for name in stored for part in name.split(".")):
        return dict(stored)
    renamed = plain_keys(stored, set(state_dict(module, keep_vars=True)))
    return {renamed.get(name, name): thing for name, thing in stored.items()}


def plain_versions(versions: Mapping[str, int], modules: Collection[str]) -> dict[str, int]:
    """Return the saved versions of modules by plain names.

    Args:
        versions: The versions by the names that the modules had when they were saved.
        modules: The plain names of the model's modules.
    """
    known = attributes()
    found: dict[str, int] = {}
    # The module inside comes after its shell, and its version counts.
    for name, version in versions.items():
        parts = tuple(name.split("."))
        places = [place for place, part in enumerate(parts) if part in known][:_MOST]
        left_out = () if name in modules else _shells_in(parts, places, modules)
        found[".".join(part for place, part in enumerate(parts) if place not in left_out)] = version
    return found
