"""Only `layout/` asks a tensor for its mesh and placements, except in a few places, each for a reason."""

from __future__ import annotations

import ast
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ASKED = {"__create_chunk_list__", "device_mesh", "placements", "full_tensor", "_spec"}

#: File to the attributes that it asks for, and the reason.
ALLOWED = {
    # Below `layout`: it hands whole values of DTensors to the user.
    "src/nucleate/cluster/communicator.py": {"full_tensor"},
    # It asks which kind of device a DTensor on the meta device stands for; `layout` is not public.
    "plugins/nucleate-lightning/src/nucleate_lightning/sharding.py": {"device_mesh"},
    # The strategy's own property, whose name is Fabric's.
    "src/nucleate/strategies/parallel.py": {"device_mesh"},
    # The method of a dimension.
    "src/nucleate/strategies/planned_layout.py": {"placements"},
    "src/nucleate/testing/dimension.py": {"placements"},
    # torch's own specification of a DTensor, for another DTensor like it.
    "src/nucleate/dimensions/sharding/sharded_copy.py": {"placements"},
}


def test_the_layout_of_a_tensor_is_read_in_one_room() -> None:
    found: dict[str, set[str]] = {}
    sources = [REPOSITORY / "src", *(REPOSITORY / "plugins").glob("*/src")]
    for path in (path for source in sources for path in sorted(source.rglob("*.py"))):
        name = path.relative_to(REPOSITORY).as_posix()
        if name.startswith("src/nucleate/layout/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            attribute = node.attr if isinstance(node, ast.Attribute) else None
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
                argument = node.args[1]
                attribute = argument.value if isinstance(argument, ast.Constant) else None
            # `entry.placements` of our own plain data is another thing: it has a layout in its name.
            is_plain = isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in ("layout", "found", "entry")
            if attribute in ASKED and not is_plain:
                found.setdefault(name, set()).add(str(attribute))
    assert found == ALLOWED
