"""The order in which dimensions are applied to a model: inner ones first, by the names in `after` and `before`."""

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
        free = next((dimension for dimension in left if not _inner(dimension, left)), None)
        if free is None:
            raise ConfigurationError(
                f"the dimensions {_circle(left)}: nobody can be applied first. Change `after` or `before`."
            )
        found.append(free)
        left.remove(free)
    return tuple(found)


def _circle(left: Sequence[Dimension]) -> str:
    """Return the sentence of a circle of dimensions that wait for each other."""
    by_name = {dimension.name: dimension for dimension in left}
    way = [left[0].name]
    while way.count(way[-1]) == 1:
        way.append(_inner(by_name[way[-1]], left)[0])
    circle = way[way.index(way[-1]) :]
    return " comes after ".join(map(repr, circle))


def _inner(dimension: Dimension, others: Sequence[Dimension]) -> list[str]:
    """Return the names of the dimensions that must be applied before a dimension: by its word, or by theirs."""
    return [other.name for other in others if other.name in dimension.after or dimension.name in other.before]
