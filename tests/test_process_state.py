"""The page about the state of the process lists the module globals that there are, and no others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PAGE = REPOSITORY / "docs" / "reference" / "process-state.md"
ROOTS = [REPOSITORY / "src", *sorted((REPOSITORY / "plugins").glob("*/src"))]
#: What a call may make at the top of a module without making state: values, patterns, types.
VALUES = {
    "FileKind", "TypeVar", "ParamSpec", "Path", "Selection", "Struct", "_WholeTraits", "bytes", "compile",
    "device", "frozenset", "get_args", "getLogger", "getattr", "int", "nullcontext", "object", "parametrize", "slice",
    "timedelta",
}  # fmt: skip

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the repository, not an installed package")


def sources() -> Iterator[tuple[str, ast.Module]]:
    for root in ROOTS:
        for path in sorted(root.rglob("*.py")):
            yield str(path.relative_to(root)), ast.parse(path.read_text())


def listed(heading: str) -> set[tuple[str, str]]:
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\S+)` \| ([^|]+) \|", section, re.MULTILINE)
    return {(file, name) for file, names in rows for name in re.findall(r"`(\w+)`", names)}


def name_of(function: ast.expr) -> str:
    if isinstance(function, ast.Subscript):
        return name_of(function.value)
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def changes(value: ast.expr | None) -> bool:
    """Tell whether what is assigned can change: an empty collection that is to be filled, or an object."""
    if isinstance(value, ast.Call):
        return name_of(value.func) not in VALUES
    return (isinstance(value, ast.Dict) and not value.keys) or (isinstance(value, ast.List) and not value.elts)


def state_of(tree: ast.Module) -> set[str]:
    found = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and changes(node.value):
            found |= {target.id for target in targets if isinstance(target, ast.Name) and target.id != "__all__"}
    return found


def caches_of(tree: ast.Module) -> set[str]:
    found = set()
    for node in tree.body:
        for decorator in getattr(node, "decorator_list", ()):
            call = decorator.func if isinstance(decorator, ast.Call) else decorator
            if isinstance(node, ast.FunctionDef) and name_of(call) in ("cache", "lru_cache"):
                found.add(node.name)
    return found


def test_every_global_that_changes_is_listed_with_its_reason() -> None:
    there = {(file, name) for file, tree in sources() for name in state_of(tree)}
    assert listed("What changes while a program runs") == there


def test_every_function_that_remembers_is_listed() -> None:
    there = {(file, name) for file, tree in sources() for name in caches_of(tree)}
    assert listed("What is asked once") == there
