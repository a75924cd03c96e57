"""Stored objects: values of a checkpoint that are not plain data, which are made only if somebody asks for them.

A checkpoint may hold objects that nobody needs, such as the hyper-parameters beside the weights. A reader leaves a
stored object in their place. Then a load of the weights alone neither makes the objects nor fails because of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False, repr=False)
class StoredObject:
    """A value that is not plain data.

    Attributes:
        name: The kind of the value, such as the name of its class.
        make: Returns the value. It raises a `CheckpointError` if the value cannot be read; this is the usual case.
    """

    name: str
    make: Callable[[], Any]

    def __repr__(self) -> str:
        return f"<{self.name}, not read>"
