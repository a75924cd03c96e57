"""Notes that the unpickler leaves in place of the things that only running code could make.

The unpickler makes containers, numbers, strings and the results of `Maker`s. A name that it does not know becomes a
`Global`, a name that the user allowed becomes an `Allowed`, and a call of either becomes an `Unmade`, which remembers
everything that the pickle does to the object. `restoring` makes the objects of allowed classes from their notes.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, NoReturn

# Names come from the file, so they may be long.
_MAX_NAME = 200


class PickleRefusedError(ValueError):
    """The error for a pickle that is not damaged, but holds something that cannot be read."""


class Maker:
    """A function that the pickle may call, or a class that it may make objects of.

    Args:
        function: The function. Its arguments come from the file, so it must check all of them.
        value: The thing that the name stands for in torch, for objects that refer to it. None if nobody may refer to
            it.

    Attributes:
        function: See above.
        value: See above.
    """

    __slots__ = ("function", "value")

    def __init__(self, function: Callable[..., Any], value: Any = None) -> None:
        self.function = function
        self.value = value


class Global:
    """A name that the pickle asks for, and that the unpickler does not look up.

    Attributes:
        name: The name with its module, cut if it is long.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}..."


class Allowed(Global):
    """A name that the user allowed with `torch.serialization.add_safe_globals`.

    Attributes:
        value: The class or function of that name.
    """

    __slots__ = ("value",)

    def __init__(self, name: str, value: Any) -> None:
        super().__init__(name)
        self.value = value


class Step(Enum):
    """A change that the pickle makes to an object after the call that makes the object."""

    STATE = "gives it a state"
    ITEMS = "sets its items"  # key, value, key, value, ...
    APPENDED = "appends to it"
    ADDED = "adds to it"


class Unmade:
    """An object that only running code could make: a call, and the changes of its result.

    Attributes:
        function: The function or class that the pickle calls.
        args: The arguments of the call.
        keywords: The keyword arguments of the call.
        is_new: Whether the call is `cls.__new__(cls, *args)` instead of `function(*args)`.
        steps: The changes after the call, in their order.
    """

    __slots__ = ("args", "function", "is_new", "keywords", "steps")

    def __init__(self, function: Any, args: tuple[Any, ...] = (), keywords: Any = None, is_new: bool = False) -> None:
        self.function = function
        self.args = args
        self.keywords: dict[str, Any] = keywords or {}
        self.is_new = is_new
        self.steps: list[tuple[Step, Any]] = []

    @property
    def name(self) -> str:
        """The name of the function that the pickle wanted to call."""
        inner = self.function
        for _ in range(100):
            if not isinstance(inner, Unmade):
                break
            inner = inner.function
        return inner.name if isinstance(inner, Global) else f"a {type(inner).__name__}"

    @property
    def is_module(self) -> bool:
        """Whether the object is a `torch.nn.Module` that was pickled whole."""
        return any(
            step is Step.STATE and isinstance(state, dict) and {"_parameters", "_buffers", "_modules"} <= state.keys()
            for step, state in self.steps
        )

    def build(self, state: Any) -> None:
        """Note the state."""
        self.steps.append((Step.STATE, state))


def is_note(value: Any) -> bool:
    """Return whether a value is one of the notes of this module."""
    return isinstance(value, (Global, Unmade, Maker))


def refuse(why: str) -> NoReturn:
    """Raise the error for something that cannot be read, although it is not damaged."""
    raise PickleRefusedError(why)
