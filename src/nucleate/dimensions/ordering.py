"""The order in which dimensions are applied to a model: inner ones first, by the names in their `after`."""

from __future__ import annotations

from collections.abc import Sequence

from nucleate.dimensions.base import Dimension
from nucleate.errors import ConfigurationError, name_list


def ordered(dimensions: Sequence[Dimension]) -> tuple[Dimension, ...]:
    """Return dimensions in an order in which each comes after those that it wraps around.

    Dimensions that do not name each other keep the order in which they were given.

    Args:
        dimensions: The dimensions.

    Raises:
        ConfigurationError: Two have the same name, or they wrap around each other in a circle.
    """
    names = [dimension.name for dimension in dimensions]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigurationError(
            f"the dimensions {name_list(names)} have {name_list(twice)} twice. Give each dimension once."
        )
    left, found = list(dimensions), list[Dimension]()
    while left:
        waiting = {dimension.name for dimension in left}
        free = next((dimension for dimension in left if not waiting & set(dimension.after)), None)
        if free is None:
            raise ConfigurationError(f"the dimensions {_circle(left)}: nobody can be applied first. Change `after`.")
        found.append(free)
        left.remove(free)
    return tuple(found)


def _circle(left: Sequence[Dimension]) -> str:
    """Return the sentence of a circle of dimensions that wait for each other."""
    by_name = {dimension.name: dimension for dimension in left}
    way = [left[0].name]
    while way.count(way[-1]) == 1:
        way.append(next(name for name in by_name[way[-1]].after if name in by_name))
    circle = way[way.index(way[-1]) :]
    return " comes after ".join(map(repr, circle))
