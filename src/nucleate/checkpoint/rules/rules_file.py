"""Rules in a TOML file, for the command line: one table for each rule."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nucleate.checkpoint.rules import functions
from nucleate.checkpoint.rules.rule import Rule
from nucleate.errors import ConfigurationError, name_list

_OPTIONS: dict[str, frozenset[str]] = {
    "rename": frozenset(("to", "optional")),
    "drop": frozenset(("optional",)),
    "concatenate": frozenset(("to", "dim", "sizes", "groups", "optional")),
    "stack": frozenset(("to", "dim", "optional")),
    "split": frozenset(("to", "dim", "sizes", "groups", "optional")),
    "unstack": frozenset(("to", "dim", "optional")),
    "transpose": frozenset(("to", "dim0", "dim1", "optional")),
    "permute_heads": frozenset(("to", "num_heads", "layout", "dim", "optional")),
}


def read_rules(path: str | os.PathLike[str]) -> list[Rule]:
    """Read rules from a TOML file.

    Each `[[rule]]` has the name of a function (`rename`, `drop`, `concatenate`, `stack`, `split`, `unstack`,
    `transpose`, `permute_heads`) with the pattern or patterns, `to` with the new name or names, and the other arguments
    of the function by name. The argument `to` of `permute_heads` is called `layout` here. A pattern that begins with
    `re:` is a regular expression.

    Args:
        path: The file.

    Raises:
        ConfigurationError: The file cannot be read, or a rule in it is wrong.
    """
    import tomllib  # Its patterns take milliseconds to compile, and few users have rules in a file.

    try:
        parsed = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{os.fspath(path)} cannot be read as rules in TOML: {error}") from error
    tables = parsed.get("rule")
    if set(parsed) != {"rule"} or not isinstance(tables, list):
        raise ConfigurationError(
            f"{os.fspath(path)} must consist of [[rule]] tables, and has {name_list(sorted(parsed)) or 'nothing'}."
        )
    return [_rule(table, f"rule {number} in {os.fspath(path)}") for number, table in enumerate(tables, 1)]


def _rule(table: Any, where: str) -> Rule:
    kinds = [name for name in _OPTIONS if isinstance(table, dict) and name in table]
    if len(kinds) != 1:
        raise ConfigurationError(f"{where} must have one of {', '.join(_OPTIONS)}; it is {table}.")
    kind = kinds[0]
    strange = sorted(set(table) - {kind} - _OPTIONS[kind])
    if strange:
        raise ConfigurationError(
            f"{where} has {name_list(strange)}; {kind} takes {', '.join(sorted(_OPTIONS[kind])) or 'nothing'}."
        )
    options = {name: value for name, value in table.items() if name not in (kind, "to")}
    patterns = table[kind]
    given: Any = (
        [_pattern(each, where) for each in patterns] if isinstance(patterns, list) else _pattern(patterns, where)
    )
    new = table.get("to")
    try:
        if kind == "drop":
            return functions.drop(given, **options)
        if kind == "rename":
            return functions.rename(given, *(new if isinstance(new, list) else [new]), **options)
        if kind in ("transpose", "permute_heads"):
            if "layout" in options:
                options["to"] = options.pop("layout")
            make: Callable[..., Rule] = getattr(functions, kind)
            return make(given, new=new, **options)
        if new is None:
            raise ConfigurationError(f"{kind} needs `to`, the name of its result.")
        made: Rule = getattr(functions, kind)(given, new, **options)
        return made
    except (ConfigurationError, TypeError) as error:
        raise ConfigurationError(f"{where}: {error}") from error


def _pattern(text: Any, where: str) -> Any:
    if isinstance(text, str) and text.startswith("re:"):
        try:
            return re.compile(text[3:])
        except re.error as error:
            raise ConfigurationError(f"{where}: {text[3:]!r} is not a regular expression: {error}.") from error
    return text
