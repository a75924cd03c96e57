"""Names of strategies that say a mesh: `"fsdp+tp=2"` is `FullyShard` and `TensorParallel` on four ranks or more.

The parts of a name stand between plus signs: the name of a strategy of data parallel, axes with their sizes, and names
of dimensions without an axis.
"""

from __future__ import annotations

from typing import cast

from nucleate.dimensions.base import Dimension
from nucleate.errors import ConfigurationError, PluginNotFoundError
from nucleate.layout import AXES
from nucleate.registry import DIMENSIONS
from nucleate.strategies.parallel import Parallel

#: The dimension and the open axis of each name of a strategy of data parallel.
_BASES = {
    "fsdp": ("fully_shard", "dp_shard"),
    "hsdp": ("fully_shard", "dp_shard"),
    "ddp": ("replicate", "dp_replicate"),
}
#: The dimension of each axis that is not split by data.
_OF_AXIS = {"tp": "tensor_parallel"}


def is_mesh_name(name: str) -> bool:
    """Return whether a name says a mesh."""
    return "+" in name or "=" in name or name in _OF_AXIS


def parse(name: str) -> Parallel:
    """Return the strategy that a name describes.

    Args:
        name: For example `"fsdp+tp=2"`, `"fsdp+dp_replicate=2"`, `"ddp+tp=4+compile"` or `"tp=2"`.

    Raises:
        PluginNotFoundError: A part of the name is unknown.
        ConfigurationError: The parts do not fit each other.
    """
    sizes: dict[str, int] = {}
    dimensions: dict[str, Dimension] = {}
    for part in name.split("+"):
        axis, has_size, size = part.partition("=")
        if has_size:
            if not size.lstrip("-").isdigit() or axis not in ("dp_replicate", "dp_shard", *_OF_AXIS):
                raise _unknown(name, part)
            sizes[axis] = int(size)
        elif part in _BASES:
            sizes.setdefault(_BASES[part][1], -1)
        elif part in _OF_AXIS:
            sizes.setdefault(part, -1)
        if has_size and axis not in _OF_AXIS:
            continue
        word = _BASES[part][0] if part in _BASES else _OF_AXIS.get(axis, part)
        if word not in DIMENSIONS.names():
            raise _unknown(name, part)
        dimensions[word] = cast(Dimension, DIMENSIONS.create(word))
    if "hsdp" in name.split("+") and "dp_replicate" not in sizes:
        raise ConfigurationError(f"strategy={name!r} needs the number of replicas: write 'hsdp+dp_replicate=2+...'.")
    known = [axis for axis in AXES if axis in sizes]
    strategy = Parallel(mesh={axis: sizes[axis] for axis in known}, dimensions=dimensions.values())
    strategy.name = name
    return strategy


def _unknown(name: str, part: str) -> PluginNotFoundError:
    words = [*_BASES, "dp_replicate=2", "dp_shard=4", *(f"{axis}=2" for axis in _OF_AXIS)]
    others = [word for word in DIMENSIONS.names() if word not in (*_OF_AXIS.values(), "fully_shard", "replicate")]
    return PluginNotFoundError(
        f"strategy={name!r} has the part {part!r}, which is unknown. Parts: {', '.join([*words, *others])}, in any "
        "order, with other numbers, and with plus signs between them; for example 'fsdp+tp=2'."
    )
