"""Key maps: new names for the keys of a checkpoint while it is read. The files on disk do not change."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from nucleate.checkpoint.rules.rule import Rule
from nucleate.errors import CheckpointKeyError, ConfigurationError, name_list

#: One of these: a dict of regular expressions and replacements as for `re.sub`, all applied in order; a function of a
#: key that returns the new key, or None to leave the key out; a rule, which may join, split and transpose tensors; or
#: several of these, applied one after the other.
KeyMap: TypeAlias = "Mapping[str, str] | Callable[[str], str | None] | Rule | Iterable[KeyMap]"


def strip_prefix(prefix: str) -> Callable[[str], str | None]:
    """Return a key map that keeps only the keys that begin with `prefix`, and removes the prefix.

    >>> strip_prefix("model.")("model.head.weight")
    'head.weight'
    """
    return lambda key: key[len(prefix) :] if key.startswith(prefix) else None


def add_prefix(prefix: str) -> Callable[[str], str | None]:
    """Return a key map that puts `prefix` before every key.

    >>> add_prefix("backbone.")("head.weight")
    'backbone.head.weight'
    """
    return lambda key: prefix + key


def map_keys(keys: Iterable[str], key_map: KeyMap | None) -> dict[str, str]:
    """Apply a key map.

    Args:
        keys: The keys of a checkpoint.
        key_map: See `KeyMap`. With None, the keys do not change.

    Returns:
        A dict from new keys to old keys, in the order of the old keys.

    Raises:
        ConfigurationError: `key_map` is not a key map, or a function in it returned neither a string nor None.
        CheckpointKeyError: The key map gives one name to two keys.
    """
    steps = list(steps_of(key_map)) if key_map is not None else []
    found: dict[str, str] = {}
    twice: list[str] = []
    for key in keys:
        new: str | None = key
        for step in steps:
            if new is None:
                break
            assert not isinstance(step, Rule), "rules are applied to tensors"
            new = step(new)
            if new is not None and not isinstance(new, str):
                raise ConfigurationError(
                    f"a key map returned {new!r} for {key!r}; it must return the new key, or None to leave it out."
                )
        if new is None:
            continue
        if new in found:
            twice.append(f"{found[new]} and {key} both become {new}")
        found[new] = key
    if twice:
        raise CheckpointKeyError(
            f"the key map gives one name to several keys: {name_list(twice)}. Leave one of each out by returning None."
        )
    return found


def steps_of(key_map: KeyMap) -> Iterable[Callable[[str], str | None] | Rule]:
    """Yield the steps of a key map in order: functions of a key, and rules.

    Raises:
        ConfigurationError: `key_map` is not a key map.
    """
    if isinstance(key_map, Rule):
        yield key_map
    elif isinstance(key_map, Mapping):
        for pattern, replacement in key_map.items():
            yield _substitution(pattern, replacement)
    elif callable(key_map):
        yield key_map
    elif isinstance(key_map, Iterable) and not isinstance(key_map, str):
        for one in key_map:
            yield from steps_of(one)
    else:
        raise ConfigurationError(
            f"{key_map!r} is not a key map. Give a dict of regular expressions and replacements, such as "
            "{'^model\\\\.': ''}, a function of a key, a rule such as `rename`, or a list of these."
        )


def _substitution(pattern: str, replacement: str) -> Callable[[str], str]:
    try:
        compiled = re.compile(pattern)
        compiled.sub(replacement, "")
    except (re.error, TypeError) as error:
        raise ConfigurationError(
            f"the key map has {pattern!r}: {replacement!r}, which is not a regular expression with a replacement: "
            f"{error}."
        ) from error
    return lambda key: compiled.sub(replacement, key)
